"""A ZMQ socket in an asyncio event loop: whole frames in and out, and the news that a peer came or left.

ZMQ's file descriptor tells of changes only once, so whatever waits is read until nothing is left, and looked for again
after each send. `zmq.asyncio` does the same with a future for each frame, which is most of what a frame costs there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import zmq
from zmq.utils.monitor import parse_monitor_message

MAX_FRAME_BYTES = 1 << 32  # the blocks of a long prefix
MAX_QUEUED = 1 << 16  # messages to one peer, which does not read; far more than an engine has places
# Frames read before others get their turn.
_AT_ONCE = 64
_PEER_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED


@dataclass(frozen=True, slots=True)
class ServerKey:
    """The key of a server (CurveZMQ): with it what is said is encrypted, and only its owner can answer."""

    public: bytes
    secret: bytes | None = field(default=None, repr=False)  # the server's own

    @classmethod
    def new(cls) -> ServerKey:
        """A fresh one for a server."""
        public, secret = zmq.curve_keypair()
        return cls(public, secret)


class Channel:
    """A socket that is read in the running event loop.

    `on_frames` gets each message's frames. `on_peers` gets the number of connections whenever it changes. Peers on the
    network are asked for a sign of life every `heartbeat_s` seconds and dropped after three without; 0 asks nobody.
    With the server's `key` both sides encrypt.
    """

    def __init__(
        self,
        kind: int,
        *,
        on_frames: Callable[[list[bytes]], None],
        on_peers: Callable[[int], None],
        heartbeat_s: float = 0.0,
        key: ServerKey | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_frames = on_frames
        self._on_peers = on_peers
        self._connections: set[int] = set()  # file descriptors in ZMQ's hands
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, MAX_QUEUED)
        self._socket.set(zmq.RCVHWM, MAX_QUEUED)
        if kind == zmq.ROUTER:
            self._socket.set(zmq.ROUTER_MANDATORY, 1)  # an error for a peer that has left, instead of silence
        if heartbeat_s:
            self._socket.set(zmq.HEARTBEAT_IVL, int(heartbeat_s * 1000))
            self._socket.set(zmq.HEARTBEAT_TIMEOUT, int(heartbeat_s * 3000))
        if key is not None:
            self._encrypt(key)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(_PEER_EVENTS)
        self._loop.add_reader(self._monitor.fileno(), self._read_monitor)
        self._loop.add_reader(self._socket.fileno(), self._read)
        # Nothing is told to one who has not looked yet.
        self._loop.call_soon(self._read_monitor)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return bool(self._socket.closed)

    def bind(self, endpoint: str) -> str:
        """Listen on `endpoint`; returns it with the port that was chosen. Raises `zmq.ZMQError`."""
        self._socket.bind(endpoint)
        return cast(bytes, self._socket.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def connect(self, endpoint: str) -> None:
        """Connect now or as soon as somebody listens there."""
        self._socket.set(zmq.RECONNECT_IVL, 5)
        self._socket.set(zmq.RECONNECT_IVL_MAX, 100)
        self._socket.connect(endpoint)

    def send(self, frames: Sequence[bytes]) -> bool:
        """Send a message; False where the queue to the peer is full. Raises `ConnectionError` where it has left."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise ConnectionError("the peer has left") from error
        finally:
            self._look_again()
        return True

    def close(self, linger_s: float = 0.0) -> None:
        """Let go of the socket; what was sent has `linger_s` to leave."""
        if self.is_closed:
            return
        self._loop.remove_reader(self._monitor.fileno())
        self._loop.remove_reader(self._socket.fileno())
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(int(linger_s * 1000))

    def _encrypt(self, key: ServerKey) -> None:
        if key.secret is not None:
            self._socket.set(zmq.CURVE_SERVER, 1)
            self._socket.set(zmq.CURVE_SECRETKEY, key.secret)
            return
        public, secret = zmq.curve_keypair()
        self._socket.set(zmq.CURVE_SERVERKEY, key.public)
        self._socket.set(zmq.CURVE_PUBLICKEY, public)
        self._socket.set(zmq.CURVE_SECRETKEY, secret)

    def _look_again(self) -> None:
        if not self.is_closed and cast(int, self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        for _ in range(_AT_ONCE):
            if self.is_closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_frames(frames)
        self._loop.call_soon(self._read)

    def _read_monitor(self) -> None:
        while not self.is_closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._connections.discard(event["value"])
            else:
                self._connections.add(event["value"])
            self._on_peers(len(self._connections))
