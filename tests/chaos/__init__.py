"""Faults on a schedule against real servers and workers, and the audit of what they left: `make chaos`, `make soak`."""
