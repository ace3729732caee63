"""Celery: its settings, what may stand in its list, the tasks. Nothing else in the worker imports Celery."""
