"""Benchmarks that anyone can repeat: each op and each loop beside its rivals, in one run."""
