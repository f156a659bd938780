"""Runs the same steps as several layouts and compares masks, order, gradients and weights."""
