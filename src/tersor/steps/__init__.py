"""Steps of a recipe, and how each is run over a model."""
