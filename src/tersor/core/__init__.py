"""The ground floor: errors, messages, files and progress. Every room may use it; it knows nothing of models."""
