"""Quantization: parts (transforms, fitters, rounders) and the runner that combines them."""
