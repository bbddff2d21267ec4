"""Checkpoints: of a run that trains, and for those who read them."""
