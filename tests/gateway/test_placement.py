from __future__ import annotations

from pathlib import Path

from fake_engine import FakeEngine
from sagellm_backend.cpu.topology import read_topology
from sagellm_control_plane.clients.process import ProcessEngineClient
from sagellm_control_plane.run_folder import run_folder
from sagellm_core.config import EngineConfig, LLMEngineConfig
from sagellm_gateway.placement import engine_maker, replicated, shared_out


def test_replicas_have_names_of_their_own() -> None:
    engines = [EngineConfig(model="a"), EngineConfig(model="b", engine_id="big")]
    assert replicated(engines, 1) == engines
    made = replicated(engines, 2)
    assert [(engine.model, engine.engine_id) for engine in made] == [
        ("a", None),
        ("a", None),
        ("b", "big-0"),
        ("b", "big-1"),
    ]


def test_engines_of_one_machine_share_it() -> None:
    alone = [EngineConfig(model="a")]
    assert shared_out(alone, "process") == alone
    engines = [
        EngineConfig(model="a"),
        EngineConfig(model="b", options={"num_threads": 7, "kv_cache_memory_bytes": 1000}),
        EngineConfig(model="c", options={"num_kv_blocks": 9}),
        EngineConfig(model="d", options={"max_batch_size": 2}),
    ]
    free, fixed, blocks, other = (engine.options for engine in shared_out(engines, "process"))
    share = LLMEngineConfig(model_path="a").kv_cache_memory_fraction / 4
    threads = max(1, read_topology().usable_threads // 4)
    assert free == {"kv_cache_memory_fraction": share, "num_threads": threads}
    assert fixed == {"num_threads": 7, "kv_cache_memory_bytes": 1000}
    assert blocks == {"num_kv_blocks": 9, "num_threads": threads}
    assert other == {"max_batch_size": 2, "kv_cache_memory_fraction": share, "num_threads": threads}
    assert shared_out(engines, "local")[0].options == {"kv_cache_memory_fraction": share}
    scaled = shared_out(engines[:1], "process", {"a": 5, "other": 9})[0].options
    assert scaled == {
        "kv_cache_memory_fraction": share * 4 / 5,
        "num_threads": max(1, read_topology().usable_threads // 5),
    }
    for engine in shared_out(engines, "process"):
        engine.to_llm_engine_config()


def test_engines_are_made_here_or_as_children(tmp_path: Path) -> None:
    config = LLMEngineConfig(model_path="fake", engine_id="one")
    with engine_maker("local", FakeEngine) as make:
        assert isinstance(make(config), FakeEngine)
    with engine_maker("process", FakeEngine) as make:
        client = make(config)
        assert isinstance(client, ProcessEngineClient)
        folder = client.log_path.parent
        assert len(str(folder)) < 60
    assert not folder.exists()
    with engine_maker("process", FakeEngine, tmp_path / "state.db") as make:
        client = make(config)
        assert isinstance(client, ProcessEngineClient)
        assert client.log_path.parent == run_folder(tmp_path / "state.db")
