"""ASAD as Pallas kernels of Hopper GPUs."""
