"""Reports: the model card and the tables."""
