"""What optiq knows of mlx-lm's models: the roles of modules, the parts of blocks, their places."""
