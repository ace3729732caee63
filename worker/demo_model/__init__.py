"""The tiny checkpoint that ships, the scenes it knows, and the program that trains it."""
