"""The model runner: `SchedulerOutput` in, sampled tokens out. The one place where a step becomes tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sagellm_backend import AttentionMetadata, BackendProvider, StepWants
from sagellm_core.engine_core.output import ModelRunnerOutput, SchedulerOutput
from sagellm_core.models.decoder import CausalLM
from sagellm_core.pooled import pool_step
from sagellm_core.sampling.logprobs import TokenLogprobs, gather_logprobs
from sagellm_core.sampling.metadata import SamplingMetadata
from sagellm_core.sampling.sampler import Sampler, SamplerOutput

# Prompt logprobs need a row of the vocabulary for every prompt token; this many at a time bounds the memory.
_PROMPT_LOGPROB_ROWS = 64


class ModelRunner:
    """Prepares a step's tensors, runs the model, samples. Stateless between steps but for weights and KV."""

    def __init__(self, model: CausalLM, provider: BackendProvider, kv_caches: list[Tensor]) -> None:
        self._device = provider.device
        self._run_step = provider.compile_step(
            lambda input_ids, meta: model.forward(input_ids, meta.positions, kv_caches, meta),
            model.compute_logits,
            model.spec.hidden_size,
        )
        self._compute_logits = provider.compile_rows(model.compute_logits, model.spec.hidden_size)
        self._sampler = Sampler()

    @torch.inference_mode()
    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Compute KV and hidden states of the scheduled tokens, and one token for each request that wants it."""
        rows = [request.sampling_row for request in output.scheduled if request.sampling_row is not None]
        want = StepWants(
            hidden=any(
                request.want_hidden_states or request.pooling or request.prompt_logprob_targets
                for request in output.scheduled
            ),
            only_best=all(row.takes_most_probable for row in rows),
        )
        computed = self._run_step(
            self._tensor(output.input_ids), self._attention_metadata(output), self._tensor(output.logits_indices), want
        )
        if computed.best is not None:
            sampled = SamplerOutput(computed.best, [None] * len(rows))
        elif computed.logits is not None:
            sampled = self._sampler(computed.logits, SamplingMetadata.from_requests(rows))
        else:
            sampled = SamplerOutput([], [])
        hidden = computed.hidden if want.hidden else None
        return ModelRunnerOutput(
            step_id=output.step_id,
            sampled_token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            hidden_states={} if hidden is None else self._hidden_states(output, hidden),
            pooled={} if hidden is None else pool_step(output, hidden),
            prompt_logprobs={} if hidden is None else self._prompt_logprobs(output, hidden),
            fallback_logprobs=sampled.fallback_logprobs,
        )

    def _attention_metadata(self, output: SchedulerOutput) -> AttentionMetadata:
        return AttentionMetadata(
            batch_type=output.batch_type,
            query_start_loc=self._tensor(output.query_start_loc),
            context_lens=self._tensor(output.context_lens),
            block_tables=self._tensor(output.block_tables),
            slot_mapping=self._tensor(output.slot_mapping),
            positions=self._tensor(output.positions),
            num_decodes=output.num_decodes,
            max_query_len=output.max_query_len,
            max_context_len=output.max_context_len,
        )

    def _tensor(self, array: object) -> Tensor:
        tensor = torch.from_numpy(array)  # shares memory: no copy on a CPU
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)

    def _hidden_states(self, output: SchedulerOutput, hidden: Tensor) -> dict[str, Tensor]:
        return {
            request.request_id: hidden[start : start + request.num_scheduled_tokens].cpu()
            for request, start in output.with_starts()
            if request.want_hidden_states
        }

    def _prompt_logprobs(self, output: SchedulerOutput, hidden: Tensor) -> dict[str, list[TokenLogprobs]]:
        """Logprob of each prompt token given those before it, for the requests that ask."""
        found: dict[str, list[TokenLogprobs]] = {}
        for request, start in output.with_starts():
            targets = request.prompt_logprob_targets
            for first in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
                part = targets[first : first + _PROMPT_LOGPROB_ROWS]
                logits = self._compute_logits(hidden[start + first : start + first + len(part)])
                counts = [request.num_prompt_logprobs] * len(part)
                found.setdefault(request.request_id, []).extend(gather_logprobs(logits, part, counts))
        return found
