"""Scores and pictures of what a checkpoint has learned, and of the pairs that training reads."""
