"""How long steps take on given hardware, by an analytic roofline model: no run, no measurement of the model at hand.

A kernel takes its fixed cost and the p-norm of the times that compute and memory would need alone, at the shares of the
peaks that good kernels reach (`Device`). A layer is its kernels and its collectives:

- tensor parallel over t devices: two all-reduces of S bytes a layer, each `link_us` + 2 (t - 1) / t * S / bandwidth
  (ring all-reduce: Patarasuk and Yuan, 2009; two a layer: Shoeybi et al., Megatron-LM, arXiv 1909.08053);
- pipeline of p stages: p - 1 sends a step; with at least p micro-batches in decoding no stage idles, a prefill of µ
  chunks leaves bubbles of (µ + p - 1) / µ (Huang et al., GPipe, arXiv 1811.06965);
- expert parallel over e devices: dispatch and combine are all-to-alls of (e - 1) / e of the tokens' hidden states, once
  for each expert of a token (Lepikhin et al., GShard, arXiv 2006.16668); only experts that some token chose are read.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

from sagellm_control_plane.planner.hardware import Device
from sagellm_control_plane.planner.model_costs import ModelCosts
from sagellm_control_plane.step_time import StepCoefficients

_ACTIVATION_BYTES = 2
_ATTENTION_S = 15e-6  # fixed cost of the attention of one layer
_ATTENTION_SHARE = 0.6  # of the peak that attention reaches, against that of a GEMM
_SMALL_OPS = 4  # of a layer: norms, rotary positions with the cache's write, activation
_SMALL_OP_PASSES = 4  # of the hidden states through memory, each
_IMBALANCE = 1.3  # load of the fullest device against the mean, where experts are spread over several


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine adds to the kernels. The defaults are those of one that replays its launches as a graph.

    `docs/planner.md` has the figures of others, and how the defaults were found.
    """

    slowdown: float = 1.15  # of kernels and collectives against the estimate
    layer_us: float = 0.0  # of the host for one layer; a step can't be shorter than its launches
    step_us: float = 1000.0  # of the host for one step: scheduling, inputs, sampling


@dataclass(frozen=True, slots=True)
class Layout:
    """How one model is laid out. One replica has tp * pp * adp devices; experts are spread over ep of its tp * adp."""

    tp: int = 1  # devices that share each layer
    pp: int = 1  # stages
    dp: int = 1  # replicas
    ep: int = 1  # groups of experts
    adp: int = 1  # copies of the attention inside one replica, for experts over more devices than attention wants

    @property
    def devices_per_replica(self) -> int:
        """Of one copy of the model."""
        return self.tp * self.pp * self.adp

    @property
    def num_devices(self) -> int:
        """Of all copies."""
        return self.devices_per_replica * self.dp

    @property
    def expert_tp(self) -> int:
        """Devices that share each expert."""
        return self.tp * self.adp // self.ep

    @property
    def strategies(self) -> set[str]:
        """The kinds of parallelism in use, by the names of `ParallelismConfig`; several together are `Hybrid`, too."""
        sizes = {"TP": self.tp, "PP": self.pp, "DP": self.dp * self.adp, "EP": self.ep}
        used = {name for name, size in sizes.items() if size > 1}
        return used | {"Hybrid"} if len(used) > 1 else used

    def __str__(self) -> str:
        parts = (("TP", self.tp), ("PP", self.pp), ("EP", self.ep), ("attention-DP", self.adp), ("DP", self.dp))
        return " ".join(f"{name}{size}" for name, size in parts if size > 1) or "1 device"


@dataclass(frozen=True, slots=True)
class StepParts:
    """Seconds of a step, by what they are spent on."""

    linear: float = 0.0  # reading and multiplying weights
    attention: float = 0.0  # reading the KV cache, comparing tokens
    small: float = 0.0  # norms, activations and the like
    collectives: float = 0.0  # all-reduce, all-to-all, sends between stages
    host: float = 0.0  # scheduling, sampling, and launches that the device waits for

    @property
    def total(self) -> float:
        """The whole step."""
        return self.linear + self.attention + self.small + self.collectives + self.host

    @property
    def largest(self) -> str:
        """What most of the time goes to."""
        return max((field.name for field in fields(self)), key=lambda name: float(getattr(self, name)))


class Roofline:
    """Step times of one replica of `model` on `device`s in a `layout`."""

    def __init__(self, model: ModelCosts, device: Device, layout: Layout, engine: Engine | None = None) -> None:
        self.model = model
        self.device = device
        self.layout = layout
        self._engine = engine or Engine()
        self._memory = 1e9 * device.bandwidth_gb_s * device.memory
        self._flops = device.flops(model.compute_dtype) * device.compute

    # ---- memory ---------------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> float:
        """On the fullest device."""
        model, layout = self.model, self.layout
        experts = model.num_moe_layers * model.num_experts * model.expert_params
        shared = model.dense_params / (layout.tp * layout.pp)
        return model.weight_bytes * (shared + experts / (layout.tp * layout.adp * layout.pp))

    @property
    def kv_bytes_per_token(self) -> float:
        """On one device; heads that can't be shared out are kept on several."""
        model, layout = self.model, self.layout
        share = 1 if model.latent_dim else min(layout.tp, model.num_kv_heads)
        return model.kv_bytes_per_token / share / layout.pp

    def num_kv_tokens(self, *, max_num_batched_tokens: int, memory_share: float = 0.9) -> int:
        """Tokens that the KV cache of a replica holds; 0 or less: the model does not fit.

        `memory_share` of the memory is used; activations of a step and buffers of the runtime go off.
        """
        model, layout = self.model, self.layout
        widest = max(model.mlp_params // model.hidden_size, 4 * model.hidden_size) / layout.tp + 4 * model.hidden_size
        activations = max_num_batched_tokens * widest * _ACTIVATION_BYTES
        logits = 256 * model.vocab_size / layout.tp * 4
        runtime = 2**30 * (1.0 if layout.devices_per_replica == 1 else 1.5)
        free = self.device.memory_gib * 2**30 * memory_share - self.weight_bytes - activations - logits - runtime
        return int(free // self.kv_bytes_per_token) * layout.adp

    # ---- time -----------------------------------------------------------------------------------------

    def prefill(self, num_tokens: int, *, num_cached_tokens: int = 0, batch_size: int = 1) -> StepParts:
        """From start to first token of `batch_size` prompts that are computed together, through all stages."""
        own = ceil(batch_size / self.layout.adp)  # prompts of one copy of the attention, which no other can share
        attention = own * num_tokens * (num_cached_tokens + num_tokens / 2)
        return self._through_all_stages(own * num_tokens, batch_size * num_tokens, own, attention, 0.0)

    def decode(self, batch_size: int, num_context_tokens: float) -> StepParts:
        """Between two tokens of every one of `batch_size` sequences, whose contexts have so many tokens each.

        A pipeline splits the batch into micro-batches, one a stage.
        """
        size = ceil(batch_size / self.layout.pp)
        own = ceil(size / self.layout.adp)
        return self._through_all_stages(own, size, own, 0.0, own * num_context_tokens)

    def prefill_busy_s(self, num_tokens: int, *, num_cached_tokens: int = 0, tokens_per_step: int = 2048) -> float:
        """How long a prompt keeps the replica from doing other work.

        Stages work on several things at once, and so do the copies of the attention.
        """
        pp, adp = self.layout.pp, self.layout.adp
        num_chunks = ceil(num_tokens / tokens_per_step)
        whole = self.prefill(num_tokens, num_cached_tokens=num_cached_tokens, batch_size=adp).total
        return whole / adp / pp * (num_chunks + pp - 1) / num_chunks

    def coefficients(self, *, num_context_tokens: int = 2000) -> StepCoefficients:
        """The same in the form that engines are learned in, near a busy step: what a cold engine may be taken for."""
        few, many, tokens = 8, 64, 1024
        base = self.decode(few, num_context_tokens).total
        per_kv = (self.decode(few, 2 * num_context_tokens).total - base) / (few * num_context_tokens)
        per_sequence = (self.decode(many, 0).total - self.decode(few, 0).total) / (many - few)
        start = self._through_all_stages(tokens, tokens, 1, 0.0, 0.0).total
        per_token = (self._through_all_stages(2 * tokens, 2 * tokens, 1, 0.0, 0.0).total - start) / tokens
        per_pair = (self._through_all_stages(tokens, tokens, 1, 1e7, 0.0).total - start) / 1e7
        fixed = max(0.0, self.decode(few, 0).total - few * per_sequence)
        return StepCoefficients(fixed, per_token, per_pair, per_kv, max(0.0, per_sequence))

    # ---- steps of the above ---------------------------------------------------------------------------

    def _through_all_stages(
        self, own: int, num_tokens: int, num_logits: int, pairs: float, kv_tokens: float
    ) -> StepParts:
        """One micro-batch of `num_tokens` from the embedding to the logits.

        One copy of the attention has `own` of the tokens, makes `num_logits`, compares `pairs` of tokens in prefills
        and reads `kv_tokens` of the cache.
        """
        model, layout = self.model, self.layout
        linear = model.num_layers * self._attention_linear_s(own)
        linear += model.num_dense_layers * self._mlp_s(own)
        if model.num_moe_layers:
            linear += model.num_moe_layers * self._experts_s(own, num_tokens)
        linear += self._gemm_s(num_logits, model.hidden_size, model.vocab_size // layout.tp)
        attention = model.num_layers * self._attention_s(pairs, kv_tokens)
        passes = _SMALL_OP_PASSES * own * model.hidden_size * _ACTIVATION_BYTES
        small = model.num_layers * _SMALL_OPS * (self.device.op_us * 1e-6 + passes / self._memory)
        return self._with_engine(StepParts(linear, attention, small, self._collectives_s(own)))

    def _with_engine(self, kernels: StepParts) -> StepParts:
        slowdown = self._engine.slowdown
        on_device = slowdown * kernels.total
        waiting = max(0.0, self.model.num_layers * self._engine.layer_us * 1e-6 - on_device)
        return StepParts(
            slowdown * kernels.linear,
            slowdown * kernels.attention,
            slowdown * kernels.small,
            slowdown * kernels.collectives,
            waiting + self._engine.step_us * 1e-6,
        )

    def _attention_linear_s(self, num_tokens: int) -> float:
        """The projections before and after the attention."""
        model, tp = self.model, self.layout.tp
        values = model.num_heads * model.head_dim
        after = model.hidden_size * values
        before = max(model.attention_params - after, model.hidden_size) // model.hidden_size
        return self._gemm_s(num_tokens, model.hidden_size, before // tp) + self._gemm_s(
            num_tokens, values // tp, model.hidden_size
        )

    def _mlp_s(self, num_tokens: int) -> float:
        model, tp = self.model, self.layout.tp
        rows = model.mlp_params // model.hidden_size
        matrices = 3 if rows % 3 == 0 else 2
        inner = rows // matrices // tp
        return self._gemm_s(num_tokens, model.hidden_size, (matrices - 1) * inner) + self._gemm_s(
            num_tokens, inner, model.hidden_size
        )

    def _experts_s(self, num_own_tokens: int, num_tokens: int) -> float:
        """Router, shared experts, and the two multiplications of the fullest device with its experts."""
        model, layout = self.model, self.layout
        local = model.num_experts / layout.ep
        is_idle = (1 - model.experts_per_token / model.num_experts) ** num_tokens
        params_read = local * (1 - is_idle) * model.expert_params / layout.expert_tp
        imbalance = _IMBALANCE if layout.ep > 1 else 1.0
        params_multiplied = (
            imbalance * num_tokens * model.experts_per_token / layout.ep * model.expert_params / layout.expert_tp
        )
        seconds = 2 * self._op_s() + self._bound_s(2 * params_multiplied, params_read * model.weight_bytes)
        seconds += self._gemm_s(num_own_tokens, model.hidden_size, model.num_experts)
        if model.shared_expert_params:
            inner = model.shared_expert_params // model.hidden_size // 3 // layout.tp
            seconds += self._gemm_s(num_own_tokens, model.hidden_size, 2 * inner)
            seconds += self._gemm_s(num_own_tokens, inner, model.hidden_size)
        return seconds

    def _attention_s(self, pairs: float, kv_tokens: float) -> float:
        model, layout = self.model, self.layout
        flops = 4 * model.num_heads / layout.tp * model.head_dim * pairs
        kv_bytes = kv_tokens * self.kv_bytes_per_token * layout.pp / model.num_layers
        bfloat16 = self.device.flops("bfloat16") * self.device.compute * _ATTENTION_SHARE
        return _ATTENTION_S + flops / bfloat16 + kv_bytes / self._memory

    def _collectives_s(self, num_tokens: int) -> float:
        """Of one micro-batch through all layers."""
        model, layout = self.model, self.layout
        size = num_tokens * model.hidden_size * _ACTIVATION_BYTES
        seconds = 0.0
        if layout.tp > 1:
            num_all_reduces = model.num_layers + model.num_dense_layers
            num_all_reduces += 0 if layout.ep > 1 else model.num_moe_layers
            seconds += num_all_reduces * self._transfer_s(2 * (layout.tp - 1) / layout.tp * size, layout.tp)
        if layout.ep > 1:
            # Each device holds 1 / tp of its copy's tokens, and all that share an expert need the whole token.
            share = (layout.ep - 1) / layout.ep * model.experts_per_token * layout.expert_tp / layout.tp
            seconds += 2 * model.num_moe_layers * self._transfer_s(share * size, layout.tp * layout.adp)
        elif layout.adp > 1:  # experts shared by all: gather the tokens, and scatter what they became
            share = (layout.adp - 1) * size
            seconds += 2 * model.num_moe_layers * self._transfer_s(share, layout.tp * layout.adp)
        if layout.pp > 1:
            seconds += (layout.pp - 1) * self._transfer_s(size, layout.devices_per_replica)
        return seconds

    def _transfer_s(self, num_bytes: float, group: int) -> float:
        """Over the node's link, or over the network where the group does not fit into a node."""
        device = self.device
        bandwidth = device.link_gb_s if group <= device.devices_per_node else device.network_gb_s
        return device.link_us * 1e-6 + num_bytes / (1e9 * bandwidth * device.link)

    def _gemm_s(self, m: int, k: int, n: int) -> float:
        """[m, k] times a weight of [k, n]."""
        weights = self.model.weight_bytes * k * n
        num_bytes = weights + _ACTIVATION_BYTES * (m * k + m * n)
        return self._op_s() + self._bound_s(2.0 * m * k * n, num_bytes)

    def _op_s(self) -> float:
        return self.device.op_us * 1e-6

    def _bound_s(self, flops: float, num_bytes: float) -> float:
        sharpness = self.device.sharpness
        compute, memory = flops / self._flops, num_bytes / self._memory
        longest = max(compute, memory)
        if longest == 0:
            return 0.0
        share: float = (compute / longest) ** sharpness + (memory / longest) ** sharpness
        return float(longest * share ** (1 / sharpness))
