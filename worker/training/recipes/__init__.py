"""What is trained how: one recipe per kind of model."""
