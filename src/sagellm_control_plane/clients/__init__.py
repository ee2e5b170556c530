"""Engines as the control plane reaches them: in this process, in a child process, over HTTP, on other machines."""
