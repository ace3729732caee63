"""Running the model: one forward per step, over paged or dense keys and values, proven at boot."""
