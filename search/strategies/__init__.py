"""Allocators and search algorithms, one file each."""
