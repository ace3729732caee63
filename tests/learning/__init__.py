"""Whole fine-tunings through the queue, by hand: `make learning`, or `python -m tests.learning captioner`.

Each draws a data set into S3, has a trainer learn it as a job, evaluates what it left, and serves that to the same
questions through the queue. A run fails when a figure misses its limit.
"""
