"""What this machine runs optiq with: checks, the kernels against float64, and their speed."""
