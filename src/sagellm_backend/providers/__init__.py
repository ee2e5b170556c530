"""One file a backend. Each has a `create(**options)` that the entry-point group `sagellm.backends` names."""
