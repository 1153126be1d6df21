"""Samples from a model: who draws them, what is recorded of each, and where they are kept."""
