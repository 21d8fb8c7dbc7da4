"""Running a model from any block on, and back through it for gradients."""
