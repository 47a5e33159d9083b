"""Runs of any kind as one page: what their files say, with the file and key of every number.

`find` says what a folder holds; `training`, `reader`, `quickstart`, `memory` and `knowledge` make
sections of it out of `parts`; `pictures` draws, `page` writes. `source` reads files so that each
value knows where it stands. Nothing is measured here.
"""
