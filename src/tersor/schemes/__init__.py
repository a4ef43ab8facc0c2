"""Schemes (format, method and input quantizer in a word), and the rules that give each site its own."""
