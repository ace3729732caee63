"""The HTTP gateway: jobs, event streams and uploads for services that speak no Celery. Needs the `api` extra.

Any number of equal processes may run: what they share is in Redis. `app.serve` runs one, `app.create_app` makes the
ASGI application, `gateway.Gateway` is what its routes work with.
"""
