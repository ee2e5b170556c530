"""What the CPU backend knows about its machine, and its native ops."""
