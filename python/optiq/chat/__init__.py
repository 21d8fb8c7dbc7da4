"""Chat templates and tool-call notations: what evals, generation and serving share."""
