"""ASAD attention as Pallas kernels for TPUs."""
