"""Fresh ids: their form, and that no two are the same, whoever asks."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from sagellm_protocol import new_request_id, new_trace_id
from sagellm_protocol.ids import new_engine_id, new_session_id, random_hex


def test_their_form() -> None:
    assert re.fullmatch(r"req-[0-9a-f]{32}", new_request_id())
    assert re.fullmatch(r"[0-9a-f]{32}", new_trace_id())
    assert re.fullmatch(r"session-[0-9a-f]{32}", new_session_id())
    assert re.fullmatch(r"engine-[0-9a-f]{12}", new_engine_id())


def test_threads_get_different_ones() -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: [random_hex() for _ in range(1000)], range(16)))
    assert len({one for some in made for one in some}) == 16_000


def test_a_child_does_not_repeat_its_parents() -> None:
    code = """
import os
from sagellm_protocol.ids import random_hex
random_hex()
pid = os.fork()
os.write(1, f"{random_hex()}\\n".encode())
if pid:
    os.waitpid(pid, 0)
else:
    os._exit(0)
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert len(set(printed)) == 2
