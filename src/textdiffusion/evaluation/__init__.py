"""How good a model is: bits per character, what its samples are like, and how far they are from text."""
