"""Workers: a device, the model on it, its KV cache, and the runner that computes steps."""
