"""How the inputs of a site are quantized, and the observers that choose the range."""
