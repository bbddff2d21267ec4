"""Checkpoints: written and restored by training (`manager`), read by others (`saved_weights`)."""
