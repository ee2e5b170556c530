"""The program of an engine process around an engine without a model: starts in half a second."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_engine import FakeEngine
from sagellm_control_plane.engine_process import main

FAKE_COMMAND = (sys.executable, __file__)

if __name__ == "__main__":
    main(FakeEngine)
