"""The insides of a model: layers that can be compressed, the packed ones, and how models of a family are called."""
