"""Events to Redis: all rows of an engine step in one call, off the engine thread. Knows events, not the engine."""
