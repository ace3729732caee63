"""Celery: app, transport and tasks. No other package of the worker imports Celery."""
