"""Measurements of the engine and the queue; the only room here that may use the client."""
