"""Weights that are zero: which of them, decided by the signal-to-noise ratio of their gradients or by magnitude."""
