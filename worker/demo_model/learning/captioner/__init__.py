"""The parts of the program that trains a captioner: captions, tokenizer, model, losses, measurement."""
