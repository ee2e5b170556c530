"""The building blocks of the decoder: plain classes that hold tensors and the backend's ops, and nothing global."""
