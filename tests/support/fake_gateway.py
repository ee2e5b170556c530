"""A gateway process over an engine without a model: `python -m fake_gateway '{"limits": ...}' --port 0`."""

from __future__ import annotations

import json
import sys

from fake_engine import FakeEngine
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway.app import Gateway
from sagellm_gateway.serving import run_gateway
from sagellm_gateway.settings import GatewaySettings


def main() -> None:
    sections = json.loads(sys.argv[1])
    port = int(sys.argv[sys.argv.index("--port") + 1])
    sections["server"] = {**sections.get("server", {}), "port": port}

    async def start() -> None:
        # Made here because its events belong to the loop that runs.
        engine = FakeEngine(max_model_len=4096)
        gateway.manager.register_engine(engine, engine_id="fake", model="m")
        await gateway.manager.start()

    gateway = Gateway(ControlPlaneManager(), default_model="m", settings=GatewaySettings.model_validate(sections))
    run_gateway(gateway, start=start, announce=lambda url: print(f"Serving m at {url}/v1", file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
