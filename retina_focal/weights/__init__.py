"""Weights: the one loader, and those of the quick starts."""
