"""What data says about a model: its inputs, its curvature, and how far two models' outputs are apart."""
