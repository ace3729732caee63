"""The parts of the training program: tokenizer, model, encoding, losses, optimiser."""
