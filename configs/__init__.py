"""Training configs: plain data. Derived ones import another and change what differs."""
