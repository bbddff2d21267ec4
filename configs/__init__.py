"""Training configs, plain data. A derived config imports another and changes what differs."""
