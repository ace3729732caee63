"""The way through a gateway: plain HTTP and server-sent events. Needs the `http` extra.

`requests` says what is sent and how an answer is read, without I/O; `sync` and `aio` send it.
"""
