"""Connections: which layers read which channels, from a table of model types or from a trace of the model."""
