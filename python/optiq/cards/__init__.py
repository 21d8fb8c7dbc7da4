"""The model card of an exported folder: its facts, and the page that states them."""
