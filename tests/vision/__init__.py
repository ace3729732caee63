"""Families whose processors need torchvision. Run by `make check` in an environment of its own; see the Makefile."""
