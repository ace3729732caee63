"""Tiny random-weight checkpoints of real model families, built in the tests and loaded like any other."""
