"""Messages to model inputs: the chat template, the processor, and text that must stay text."""
