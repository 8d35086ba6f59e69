"""What families share of the reverse process."""
