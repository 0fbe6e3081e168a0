"""Recipes: each tells the whole story of one task, from a float model to a verified quantized checkpoint."""
