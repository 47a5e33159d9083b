"""The reader: a small decoder that learns to answer from references, and what it is taught with.

First it reads references in its own text, later as explicit memories. `data.py` makes everything.
"""
