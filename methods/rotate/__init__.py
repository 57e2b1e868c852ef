"""Rotations of a whole model: its function stays, and its weights and activations lose their outliers."""
