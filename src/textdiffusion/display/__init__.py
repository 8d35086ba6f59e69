"""What people look at: frames of text appearing, the terminal, plots, and replays for a browser."""
