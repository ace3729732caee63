"""The contract: what crosses a boundary between producers, workers and readers. pydantic only, no I/O."""
