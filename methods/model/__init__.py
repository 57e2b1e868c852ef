"""The model: its structure, loading, saving and running it block by block."""
