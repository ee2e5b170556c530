"""The tokenizer of a model: text to token ids and back, and its chat template.

Holds `Tokenizer`, `TokenizerBackend` (what it stands on) and `load_tokenizer`, which reads a model folder with a
`tokenizer.json`, a `.gguf` file, or, through the optional package `transformers`, a folder that has neither. Objects
behave the same for ever after loading and are safe to share between threads.

Behaviour follows Hugging Face:
- Which tokens frame a text (BOS) is decided by the post-processor of `tokenizer.json`, unless `add_bos_token` or
  `add_eos_token` stand in `tokenizer_config.json`: then by those.
- Special tokens written out in a text, also in a user's text (`<|im_end|>`), become those tokens, unless
  `split_special_tokens` is set. Whoever does not trust a text removes them first.
- `decode` is exactly that of `tokenizers`; `clean_up_tokenization_spaces` is not applied, it would damage BPE text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sagellm_core.chat_template import ChatTemplates, render_plain_chat
from sagellm_core.detokenizer import token_text
from sagellm_protocol.errors import InvalidArgumentError, NotFoundError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["FastBackend", "Tokenizer", "TokenizerBackend", "load_tokenizer"]

# Long texts take the library's batch calls, which let other threads run meanwhile.
_LONG_CHARS = 4096
_LONG_IDS = 1024
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenizerBackend(Protocol):
    """What a `Tokenizer` needs from the library below it."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that decoding with `skip_special_tokens` leaves out."""
        ...

    @property
    def decoder_state(self) -> Mapping[str, Any] | None:
        """The decoder chain in the JSON form of `tokenizers`; None if there is no decoder."""
        ...

    @property
    def definition(self) -> str | None:
        """The whole tokenizer in the JSON form of `tokenizers`, written on each call; None if it has no such form."""
        ...


class Tokenizer:
    """Text to ids and back for one model.

    `special_tokens` maps names such as `bos_token` to their text, as chat templates want them. `eos_token_ids` are all
    ids that end a text, the first being that of `eos_token`.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        extra_eos_token_ids: Iterable[int] = (),
    ) -> None:
        self._backend = backend
        self.special_tokens: Mapping[str, str] = dict(special_tokens or {})
        self.chat_templates = ChatTemplates(chat_templates or {})
        self.vocab_size = backend.vocab_size
        self.special_token_ids = backend.special_token_ids
        self.decoder_state = backend.decoder_state
        self._token_texts: dict[int, str] = {}
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        first = [] if self.eos_token_id is None else [self.eos_token_id]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*first, *extra_eos_token_ids]))

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template; without one chats are rendered plainly."""
        return len(self.chat_templates) > 0

    @property
    def definition(self) -> str | None:
        """The content of a `tokenizer.json` for this tokenizer, or None; some megabytes, written on each call."""
        return self._backend.definition

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, framed by the model's special tokens (usually a BOS) if wanted.

        Raises `InvalidArgumentError` for what is not a string of Unicode text.
        """
        if not isinstance(text, str):
            raise InvalidArgumentError(f"prompt must be a string, got {type(text).__name__}", field="prompt")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                f"prompt holds a lone surrogate at character {error.start}, which is not text; remove it or decode the "
                "input as UTF-8",
                field="prompt",
            ) from error
        return self._backend.encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that form no character become U+FFFD, unknown ids nothing."""
        return self._backend.decode(token_ids, skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id, None if there is no such id."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry in its own spelling, None if there is none."""
        return self._backend.token_to_id(token)

    def token_text(self, token_id: int) -> str:
        """What a token reads like in the middle of a text, with its leading space; remembered for the next time."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = token_text(self, token_id)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation; `chat_template` names one of several templates.

        Without a template it is the plain `User: ...` / `Assistant:` form of `render_plain_chat`, and tools and
        `variables` have no effect. Raises `InvalidArgumentError` if the template refuses the messages.
        """
        if not self.has_chat_template:
            return render_plain_chat(messages, add_generation_prompt=add_generation_prompt)
        template = self.chat_templates.choose(with_tools=tools is not None, name=chat_template)
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**self.special_tokens, **variables},
        )

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The prompt ids of a conversation; `options` as in `apply_chat_template`.

        A template writes its own special tokens, so none are added; the plain form gets them like any text.
        """
        text = self.apply_chat_template(messages, **options)
        return self.encode(text, add_special_tokens=not self.has_chat_template)


class FastBackend:
    """A `tokenizers.Tokenizer`. Padding and truncation that its file may ask for are for training and switched off."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(tokenizer.get_vocab_size(with_added_tokens=True), 1 + max(added, default=-1))
        decoder = tokenizer.decoder
        self.decoder_state: Mapping[str, Any] | None = None if decoder is None else json.loads(decoder.__getstate__())

    @property
    def definition(self) -> str | None:
        return str(self._tokenizer.to_str())

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) > _LONG_CHARS:
            return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if len(token_ids) > _LONG_IDS:
            return str(self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0])
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, a `tokenizer.json` file or a `.gguf` file.

    Raises `NotFoundError` where nothing is, `InvalidArgumentError` for a file that cannot be read, and
    `UnavailableError` for a folder without `tokenizer.json` where `transformers` is not installed.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        from sagellm_core.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    folder = path.parent if path.is_file() else path
    file = path if path.is_file() else path / "tokenizer.json"
    if not folder.is_dir():
        raise NotFoundError(
            f"no model folder {path}; give a folder with tokenizer.json or a .gguf file", path=str(path)
        )
    if not file.is_file():
        from sagellm_core.hf_tokenizer import load_hf_tokenizer

        return load_hf_tokenizer(folder)
    return _load_fast(file, folder)


def _load_fast(file: Path, folder: Path) -> Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InvalidArgumentError(
            f"{file} is not a readable tokenizer.json ({error}); download the model again", path=str(file)
        ) from error
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    special_tokens = _named_tokens(config)
    _add_missing_tokens(backend, config, special_tokens)
    _frame_by_config(backend, config, special_tokens)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    return Tokenizer(
        FastBackend(backend), special_tokens=special_tokens, chat_templates=_read_chat_templates(folder, config)
    )


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgumentError(
            f"{file} is not valid JSON ({error}); download the model again", path=str(file)
        ) from error
    if not isinstance(data, dict):
        raise InvalidArgumentError(f"{file} must hold a JSON object; download the model again", path=str(file))
    return data


def _token_text(token: Any) -> str | None:
    """The text of a token that a configuration writes as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name))) is not None}


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Make the tokens that the configuration lists tokens of the tokenizer, special where it says so.

    A named token that is nowhere in the vocabulary is left out: it would get an id that the model has no row for.
    """
    from tokenizers import AddedToken

    listed = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        text = _token_text(entry)
        if text is not None and backend.token_to_id(text) is None:
            flags = {key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "normalized") if key in entry}
            backend.add_tokens([AddedToken(text, special=bool(entry.get("special", False)), **flags)])
    extra = [*(config.get("additional_special_tokens") or ()), *_listed(config.get("extra_special_tokens"))]
    special = [*special_tokens.values(), *(text for token in extra if (text := _token_text(token)) is not None)]
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in dict.fromkeys(special) if text not in known and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _listed(tokens: Any) -> list[Any]:
    """`extra_special_tokens` is a list in some files and a mapping of names in others."""
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


def _frame_by_config(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Let `add_bos_token` and `add_eos_token`, where the configuration has them, replace the post-processor."""
    if config.get("add_bos_token") is None and config.get("add_eos_token") is None:
        return
    frame_tokens(
        backend,
        bos=special_tokens.get("bos_token") if config.get("add_bos_token") else None,
        eos=special_tokens.get("eos_token") if config.get("add_eos_token") else None,
    )


def frame_tokens(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Make `backend` put `bos` before and `eos` after every text; a token that it does not have is left out."""
    from tokenizers.processors import TemplateProcessing

    ids = {token: backend.token_to_id(token) for token in (bos, eos) if token is not None}
    special_tokens = [(token, token_id) for token, token_id in ids.items() if token_id is not None]
    known = {token for token, _ in special_tokens}
    before = f"{bos}:0 " if bos in known else ""
    after = f" {eos}:0" if eos in known else ""
    backend.post_processor = TemplateProcessing(
        single=f"{before}$A:0{after}", pair=f"{before}$A:0{after} $B:1", special_tokens=special_tokens
    )


def _read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files win over the configuration, which holds one template or a list of named ones."""
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    source = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    return named_chat_templates(source)


def named_chat_templates(source: Any) -> dict[str, str]:
    """`chat_template` of a configuration as name -> template: it is a string, a mapping or a list of named ones."""
    if isinstance(source, str):
        return {"default": source}
    if isinstance(source, list):
        return {str(entry["name"]): str(entry["template"]) for entry in source}
    return {str(name): str(template) for name, template in (source or {}).items()}
