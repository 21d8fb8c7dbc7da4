"""The server as HTTP: what may come in, and how answers go out."""
