"""Several processes on one job, as mlx.launch starts them."""
