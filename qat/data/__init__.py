"""Data sets for the recipes, through ``datasets``; nothing here knows of quantization."""
