"""Videos to batches of frame pairs."""
