"""From scores and a size to a plan. Tables in, tables out: no MLX, no files of models."""
