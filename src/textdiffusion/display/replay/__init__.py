"""Recordings of texts that appear, and the HTML that plays them again: on the page, in a notebook, in a file."""
