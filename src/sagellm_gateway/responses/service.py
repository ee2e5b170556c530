"""What a response stands on: the conversation before it, and the store it goes into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import TypeAdapter

from sagellm_gateway.responses.render import ResponseDraft, new_id
from sagellm_gateway.responses.store import ResponseStore, StoredResponse
from sagellm_gateway.responses.translate import as_items, to_chat
from sagellm_gateway.responses.types import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputText,
    Item,
    ItemReference,
    MessageItem,
    OutputText,
    ResponsesRequest,
)
from sagellm_protocol import InvalidArgumentError, NotFoundError
from sagellm_protocol.openai import ChatCompletionRequest

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_encode = msgspec.json.Encoder().encode


class Conversation:
    """One request for a response with what it refers to; `owner` is the key that asks.

    Raises `InvalidArgumentError` for a response or an item that isn't stored, `UnsupportedError` for what isn't done.
    """

    def __init__(self, call: ResponsesRequest, store: ResponseStore, owner: str | None) -> None:
        call.refuse_unsupported()
        self._call = call
        self._store = store
        self._owner = owner
        self._earlier = self._earlier_items()
        self._input = [_complete(self._resolved(item, index)) for index, item in enumerate(as_items(call))]
        self.draft = ResponseDraft(call)

    def to_chat(self) -> ChatCompletionRequest:
        """The chat request that answers it."""
        return to_chat(self._call, [*self._earlier, *self._input])

    def keep(self, body: dict[str, Any]) -> None:
        """Store the response that ended as `body`, unless the request says not to."""
        if self._call.store is False:
            return
        ids = {item.id for item in self._input} | {item["id"] for item in body["output"]}
        stored = StoredResponse(
            id=body["id"],
            body=_encode(body),
            earlier=_dump(self._earlier),
            input=_dump(self._input),
            output=_encode(body["output"]),
            item_ids=frozenset(item_id for item_id in ids if item_id is not None),
            stored_at=self._store.now(),
        )
        self._store.put(self._owner, stored)

    def _earlier_items(self) -> list[Item]:
        previous = self._call.previous_response_id
        if previous is None:
            return []
        try:
            stored = self._store.get(self._owner, previous)
        except NotFoundError as error:
            raise InvalidArgumentError(
                f"previous_response_id: {error.message}", field="previous_response_id"
            ) from error
        return [*_load(stored.earlier), *_load(stored.input), *_load(stored.output)]

    def _resolved(self, item: Item, index: int) -> Item:
        if not isinstance(item, ItemReference):
            return item
        stored = self._store.find_item(self._owner, item.id)
        known = self._earlier if stored is None else [*_load(stored.input), *_load(stored.output)]
        found = next((candidate for candidate in known if candidate.id == item.id), None)
        if found is None:
            raise InvalidArgumentError(
                f"input[{index}].id: no item {item.id!r} is stored; send the item itself", field=f"input[{index}].id"
            )
        return found


def input_items(stored: StoredResponse) -> list[dict[str, Any]]:
    """The items that the request of a stored response gave."""
    items: list[dict[str, Any]] = msgspec.json.decode(stored.input)
    return items


def _complete(item: Item) -> Item:
    """The item with an id, and with parts instead of a bare text, as stored items are shown."""
    changes: dict[str, Any] = {}
    if item.id is None:
        changes["id"] = new_id(_prefix(item))
    if isinstance(item, MessageItem) and isinstance(item.content, str):
        part = OutputText if item.role == "assistant" else InputText
        changes["content"] = [part(text=item.content)]
    return item.model_copy(update=changes) if changes else item


def _prefix(item: Item) -> str:
    if isinstance(item, FunctionCallItem):
        return "fc"
    if isinstance(item, FunctionCallOutputItem):
        return "fco"
    return "msg" if isinstance(item, MessageItem) else "rs"


def _dump(items: Sequence[Item]) -> bytes:
    return _ITEMS.dump_json(list(items), exclude_none=True)


def _load(items: bytes) -> list[Item]:
    return _ITEMS.validate_json(items)
