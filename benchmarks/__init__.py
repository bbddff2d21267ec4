"""Measurements of the project: run from its root, not installed with it."""
