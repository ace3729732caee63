"""Broken, odd and hostile media, made from seeds: every format that jobs may use, and what pretends to be one.

`python -m tests.corpus` runs all of them through the media layer and prints times and memory.
"""
