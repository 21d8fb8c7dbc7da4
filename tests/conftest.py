"""optiq is imported before anything imports mlx, so that MLX gets the fast matmul (optiq.blas)."""

import optiq  # noqa: F401
