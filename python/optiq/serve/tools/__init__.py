"""Tools that the server runs itself: Python in the sandbox (python.py), and the rounds of answers
and results that come of it (rounds.py)."""
