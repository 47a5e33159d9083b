"""Explicit memory: documents as sparse attention key-values on disk, read while generating."""
