"""Analyses of a model before or after it is compressed: bytes, time and loss."""
