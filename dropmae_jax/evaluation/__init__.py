"""What a checkpoint has learned, and what it is trained on: pictures."""
