"""A server for OpenAI's and Anthropic's clients, around an engine that answers many at once."""
