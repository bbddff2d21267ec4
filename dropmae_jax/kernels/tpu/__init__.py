"""ASAD as Pallas kernels of TPUs."""
