"""ASAD by kernels of TPUs and GPUs, and the choice among the implementations."""
