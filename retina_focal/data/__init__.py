"""Datasets: their registration, and two small ones of real photographs."""
