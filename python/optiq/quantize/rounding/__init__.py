"""Rounding: from weights and a format to codes, scales and biases."""
