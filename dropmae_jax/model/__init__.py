"""The autoencoder: its parts as pure functions and Flax modules."""
