"""What every room may use, and what knows nothing of models: messages, files, progress."""
