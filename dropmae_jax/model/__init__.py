"""The masked autoencoder and its parts: pure functions and Flax modules."""
