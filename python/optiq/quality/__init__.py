"""How far a model is from another one: divergence, and the statistics behind every error bar."""
