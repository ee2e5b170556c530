"""`python -m sagellm`: the same as the command `sage-llm`."""

from __future__ import annotations

from sagellm.cli import main

if __name__ == "__main__":
    main()
