"""What the compilers of TPUs and GPUs say of a training step, without the hardware."""
