"""Step programs: what is recorded computes to the bit what the eager forward computes, step after step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.support.model_zoo import FAMILIES, build

from sagellm_backend import AttentionMetadata, BackendProvider, CPUBackendProvider, KVLayout, StepWants
from sagellm_core.models import load_model

pytest.importorskip("sagellm_backend._native", reason="the native kernels were not built: no C++ compiler")

from sagellm_backend.cpu.step_program import NotRecordableError, Recorder, Rows, record_rows

BLOCK_SIZE = 16
# Heads of 24 entries have no attention kernel, and routing has no kernels.
EAGER = {"llama", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"}
# (query lengths, context lengths) of the steps: prefills, a mixed step, decodes; single tokens stand first.
STEPS = [([20, 7], [20, 7]), ([1, 13], [8, 33]), ([1, 1], [9, 34]), ([1], [35])]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder)
    return request.param, folder


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_program_computes_what_the_forward_computes(checkpoint: tuple[str, Path], num_threads: int) -> None:
    family, folder = checkpoint
    provider = CPUBackendProvider()
    model = load_model(folder, provider=provider, max_model_len=64)
    spec = model.spec
    layout = KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK_SIZE, torch.float32)
    caches = [provider.allocate_kv_cache(layout, 8) for _ in range(2)]

    def forward_on(kv_caches: list[torch.Tensor]) -> object:
        return lambda ids, meta: model.forward(ids, meta.positions, kv_caches, meta)

    eager = BackendProvider.compile_step(provider, forward_on(caches[0]), model.compute_logits, spec.hidden_size)
    compiled = provider.compile_step(forward_on(caches[1]), model.compute_logits, spec.hidden_size)
    assert hasattr(compiled, "recorder") == (family not in EAGER)
    logits_of = provider.compile_rows(model.compute_logits, spec.hidden_size)
    generator = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for query_lens, context_lens in STEPS:
            meta = AttentionMetadata.build(
                query_lens=query_lens,
                context_lens=context_lens,
                block_tables=[[5, 2, 7], [0, 6, 3]][: len(query_lens)],
                block_size=BLOCK_SIZE,
            )
            ids = torch.randint(3, spec.vocab_size, (sum(query_lens),), generator=generator)
            samples = meta.query_start_loc[1:].long() - 1
            wanted = eager(ids, meta, samples, StepWants(hidden=True))
            got = compiled(ids, meta, samples, StepWants(hidden=True))
            assert torch.equal(wanted.hidden, got.hidden)
            assert torch.equal(wanted.logits, got.logits)
            assert torch.equal(wanted.logits, logits_of(got.hidden[samples]))
            # Again, into the same slots: what is not wanted is not there, and nothing else changes.
            assert torch.equal(wanted.logits, compiled(ids, meta, samples, StepWants()).logits)
            best = compiled(ids, meta, samples, StepWants(only_best=True))
            assert best.best is None or best.best == wanted.logits.argmax(-1).tolist()
            nothing = compiled(ids, meta, samples[:0], StepWants(only_best=True))
            assert (nothing.logits, nothing.best) == (None, None)
    finally:
        torch.set_num_threads(before)


def test_what_has_no_kernel_is_refused_with_its_name() -> None:
    recorder = Recorder(0)
    x = Rows(recorder, 0, 0, 8)
    for use, name in (
        (lambda: torch.softmax(x, -1), "softmax"),
        (lambda: x / 2.0, "no kernel"),
        (lambda: x[0], "no kernel"),
        (lambda: x.cumsum(0), "cumsum"),
        (lambda: x * x, "no kernel"),
        (lambda: recorder.linear(x, SimpleNamespace()), "not packed"),
    ):
        with pytest.raises(NotRecordableError, match=name):
            use()


def test_buffers_share_memory_only_when_their_lives_are_apart() -> None:
    """x * 2 * 3 * ... + x: a chain of short lives beside a long one."""

    def function(x: torch.Tensor) -> torch.Tensor:
        kept = x * 2.0
        y = kept
        for factor in (3.0, 5.0, 7.0, 11.0):
            y = y * factor
        return (y + kept) * 0.5

    x = torch.randn(5, 37)
    for isa in range(1):
        assert torch.equal(record_rows(isa, function, 37)(x), function(x))
