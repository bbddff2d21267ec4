"""Converts checkpoints to PyTorch and safetensors weight files, and back."""
