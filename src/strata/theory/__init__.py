"""What knowledge costs in each memory format, and which format each piece of it should have."""
