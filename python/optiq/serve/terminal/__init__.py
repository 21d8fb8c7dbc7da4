"""A conversation in the terminal: talk.py asks the engine, screen.py shows, commands.py reads."""
