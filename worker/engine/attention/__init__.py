"""Attention over paged keys and values, and the code for a device that computes it."""
