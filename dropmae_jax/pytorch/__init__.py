"""Files of weights of PyTorch and safetensors, to and from ours."""
