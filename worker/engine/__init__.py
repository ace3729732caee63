"""Continuous batching over unmodified transformers models: tensors in, token outputs out.

Knows no Celery, Redis, S3 or images.
"""
