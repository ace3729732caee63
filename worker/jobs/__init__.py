"""One job from its message to its outcome."""
