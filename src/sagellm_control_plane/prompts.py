"""What the control plane finds out of a prompt before it goes to an engine: its length and the names of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from sagellm_control_plane.engines import ManagedEngine
from sagellm_kv_cache.hashing import extend_block_hashes, root_hash
from sagellm_protocol import Request, TokenizeRequest

_BYTES_PER_TOKEN = 4  # of UTF-8 text, the usual estimate
_MOST_CHARS_PER_TOKEN = 16  # of a prompt that is split here: a longer one may not fit, and to see that would take long


async def with_tokens(request: Request, serving: Sequence[ManagedEngine]) -> Request:
    """The request with its prompt's token ids, so that neither routing nor the engine has to make them again.

    As it is where it has them, where the engines do not share one model, or where none that is loaded could split it.
    Raises `InvalidArgumentError` for a conversation that the model's template refuses, as the engine would.
    """
    if request.prompt_token_ids is not None or isinstance(request.prompt, list) or request.embed is not None:
        return request
    loaded = next((engine for engine in serving if engine.is_loaded), None)
    if loaded is None or len({engine.instance.model_name for engine in serving}) > 1:
        return request
    if len(text_of(request)) > _MOST_CHARS_PER_TOKEN * loaded.client.config.max_model_len:
        return request
    if request.prompt is not None:
        wanted = TokenizeRequest(prompt=request.prompt)
    else:
        wanted = TokenizeRequest(
            messages=request.messages, tools=request.tools, chat_template_kwargs=request.chat_template_kwargs
        )
    token_ids = await loaded.client.tokenize(wanted)
    return request.model_copy(update={"prompt_token_ids": token_ids}) if token_ids else request


class BlockNames(Sequence[bytes]):
    """The names that the engines' caches have for the full blocks of a prompt, made as far as somebody asks.

    Most prompts share with what is cached a beginning or nothing, and a long one takes milliseconds to name.
    """

    __slots__ = ("_block_size", "_made", "_num_blocks", "_root", "_token_ids")

    def __init__(self, token_ids: Sequence[int], block_size: int, root: bytes) -> None:
        """`token_ids` are valid, and change no more."""
        self._token_ids = token_ids
        self._block_size = block_size
        self._root = root
        self._num_blocks = len(token_ids) // block_size
        self._made: list[bytes] = []

    def __len__(self) -> int:
        return self._num_blocks

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        places = range(self._num_blocks)[index]
        end = places + 1 if isinstance(places, int) else max(places, default=-1) + 1
        extend_block_hashes(self._made, self._token_ids, self._block_size, end, self._root)
        return self._made[places] if isinstance(places, int) else [self._made[place] for place in places]


def block_hashes(request: Request, block_size: int) -> Sequence[bytes]:
    """The names of the prompt's full blocks; none where its tokens are not known."""
    token_ids = request.prompt if isinstance(request.prompt, list) else request.prompt_token_ids
    return BlockNames(token_ids, block_size, root_hash(request.cache_salt, request.lora)) if token_ids else ()


def text_of(request: Request) -> str:
    """The text that a prompt begins with, for engines that tell nothing of their caches."""
    if isinstance(request.prompt, str):
        return request.prompt
    return "".join([str(message.content) for message in request.messages or ()])


def estimate_prompt_tokens(request: Request) -> int:
    """Prompt tokens for ledger and routing: exact where the token ids are known, else by the length of the UTF-8."""
    token_ids = request.prompt if isinstance(request.prompt, list) else request.prompt_token_ids
    if token_ids is not None:
        return len(token_ids)
    text = text_of(request)
    num_bytes = len(text) if text.isascii() else len(text.encode("utf-8", errors="replace"))
    return max(1, num_bytes // _BYTES_PER_TOKEN)


def num_outputs(request: Request) -> int:
    """How many answers it asks for."""
    sampling = request.sampling_params
    return 1 if sampling is None else sampling.n


def output_limit(request: Request) -> int | None:
    """The most tokens of one answer, where the request says so."""
    if request.max_tokens is not None:
        return request.max_tokens
    sampling = request.sampling_params
    return sampling.max_tokens if sampling is not None and "max_tokens" in sampling.model_fields_set else None


def wants_prompt_logprobs(request: Request) -> bool:
    """Whether the answer has to tell of the prompt's tokens."""
    return request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None
