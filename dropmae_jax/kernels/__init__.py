"""Kernels for ASAD attention on TPUs and GPUs, and the choice of an implementation."""
