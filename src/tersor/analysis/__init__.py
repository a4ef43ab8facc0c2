"""What can be said of a model before it is compressed."""
