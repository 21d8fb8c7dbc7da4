"""Figures of docs/performance.md and docs/quality.md."""

import optiq  # noqa: F401  before mlx, whose float32 products are then optiq's
