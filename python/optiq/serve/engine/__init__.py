"""Many requests in one model, each answered as if it were alone. Nothing here knows of HTTP."""
