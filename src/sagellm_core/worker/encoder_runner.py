"""The runner of encoders: `SchedulerOutput` in, the pooled row of each text out."""

from __future__ import annotations

import torch

from sagellm_backend import BackendProvider
from sagellm_core.engine_core.output import ModelRunnerOutput, SchedulerOutput
from sagellm_core.models.encoder import EncoderModel
from sagellm_core.pooled import pool_step


class EncoderRunner:
    """Runs whole texts; nothing is cached and nothing sampled, so that a step is all there is to a request."""

    def __init__(self, model: EncoderModel, provider: BackendProvider) -> None:
        self._model = model
        self._device = provider.device

    @torch.inference_mode()
    def execute_model(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Compute the hidden states of the scheduled texts and pool them."""
        input_ids, positions = (
            torch.from_numpy(array).to(self._device) for array in (output.input_ids, output.positions)
        )
        hidden = self._model.forward(input_ids, positions, output.query_start_loc.tolist())
        return ModelRunnerOutput(output.step_id, [], [], pooled=pool_step(output, hidden))
