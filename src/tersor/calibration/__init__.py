"""Calibration: inputs of every site, curvature of the loss, and the divergence between two models' outputs."""
