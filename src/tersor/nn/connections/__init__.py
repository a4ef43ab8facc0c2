"""Which layers read which channels: from a table of transformers by model type, or from a trace of the model."""
