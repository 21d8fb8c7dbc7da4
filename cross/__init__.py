"""Wheels for other machines, built and checked here; see cross/README.md."""
