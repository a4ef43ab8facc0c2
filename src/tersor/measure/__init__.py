"""Measuring: size, operations, latency, memory, and the verdict."""
