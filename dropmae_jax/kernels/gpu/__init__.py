"""ASAD attention as Pallas kernels for Hopper GPUs."""
