"""Quantizers of a site's inputs, and the observers that choose their range."""
