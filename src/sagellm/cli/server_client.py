"""A client of OpenAI's API on the standard library alone: it is there in a fiftieth of a second, httpx in a tenth.

Every failure is a `SageLLMError` of the code that fits: no connection, a wrong key, a refusal, an answer in no form.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from sagellm_protocol import SageLLMError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CODES = {401: "unauthenticated", 403: "permission_denied", 404: "not_found", 429: "resource_exhausted"}


class ServerClient:
    """Calls one server.

    Args:
        url: its address, with or without `/v1`.
        api_key: sent as a bearer token.
        timeout_s: most seconds to wait for a connection, and between two parts of an answer.
        is_own: a server of this user on this machine, whose certificate need not name the loopback address.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0, is_own: bool = False) -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise make_error("invalid_argument", f"{url!r} is no address; give one such as http://127.0.0.1:8000")
        self._headers = {"Content-Type": "application/json", "User-Agent": "sage-llm"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        handlers: list[urllib.request.BaseHandler] = []
        if is_own or parts.hostname in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy would look for the server on its own machine
        if is_own:
            context = ssl._create_unverified_context()
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str) -> dict[str, Any]:
        """A JSON answer."""
        with self._open(path, None) as answer:
            return _object_in(answer.read())

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to a JSON body."""
        with self._open(path, body) as answer:
            return _object_in(answer.read())

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The server-sent events of an answer, up to `[DONE]`. Closing the iterator ends the request."""
        with self._open(path, body) as answer:
            for line in answer:
                if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                    yield _object_in(data)

    @contextmanager
    def _open(self, path: str, body: dict[str, Any] | None) -> Iterator[HTTPResponse]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read()) from error
        except urllib.error.URLError as error:
            message = f"no server answers at {self.url}: {error.reason}; is it running?"
            raise make_error("unavailable", message) from error
        except (OSError, HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise make_error("unavailable", f"the connection to {self.url} broke off: {reason}; try again") from error
        except _NoObject as error:
            raise make_error("unavailable", f"{self.url} does not speak OpenAI's API ({error}); check it") from error


class _NoObject(Exception):
    """What should have been a JSON object is something else."""


def _object_in(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise _NoObject(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise _NoObject("JSON, but no object")
    return value


def _refusal(status: int, content: bytes) -> SageLLMError:
    try:
        error = _object_in(content).get("error")
    except _NoObject:
        error = None
    refusal = error_of(error or f"the server answered with status {status}", status)
    if refusal.code.value == "unauthenticated":  # its remedy names a header
        return make_error("unauthenticated", f"{refusal.message.partition(';')[0]}; give one with --api-key")
    return refusal


def error_of(error: Any, status: int = 500) -> SageLLMError:
    """Our error for a server's; servers that are not ours have codes of their own."""
    from sagellm_protocol import ErrorCode

    fields = error if isinstance(error, dict) else {"message": error}
    code = fields.get("code")
    if code not in {known.value for known in ErrorCode}:
        code = _CODES.get(status, "invalid_argument" if 400 <= status < 500 else "unavailable")
    return make_error(str(code), str(fields.get("message") or f"the server answered with status {status}"))


def make_error(code: str, message: str) -> SageLLMError:
    """An error of the protocol, which is imported only where something fails."""
    from sagellm_protocol import Error, ErrorCode

    return Error(code=ErrorCode(code), message=message).to_exception()
