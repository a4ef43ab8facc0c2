"""How a weight is compressed, in a word: format, method and input quantizer, and which site gets which."""
