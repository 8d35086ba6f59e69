"""The reverse: one loop from noise to text (reverse.py), and all that steers it, whatever the family."""
