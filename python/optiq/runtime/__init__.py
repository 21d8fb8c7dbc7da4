"""Models ready to run: loading and generating."""
