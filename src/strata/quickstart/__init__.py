"""The first thing a newcomer runs: train a model with memory and its dense twin, compare them.

May import every room but the command line.
"""
