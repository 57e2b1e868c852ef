"""Kernels: one file each, all checked against the reference numerics before they are timed."""
