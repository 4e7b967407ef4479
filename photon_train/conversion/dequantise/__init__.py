"""Quantised checkpoints: one module per format, and what writes the ordinary checkpoint that they stand for."""
