"""A limit of time on a whole HTTP request: httpcore's own are for each read, so that a server that drips never meets them.

A request runs in its caller's thread, so the limit is the thread's: whatever connection its bytes come from.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore2


class Limit:
    """`with limit(seconds, wanted):` bounds the reads and writes of this thread inside.

    wanted: called every `slice_` seconds of waiting; its errors end the request.
    """

    def __init__(self, slice_: float) -> None:
        self.slice, self._here = slice_, threading.local()

    @contextmanager
    def __call__(self, seconds: float, wanted: Callable[[], None]) -> Iterator[None]:
        self._here.until, self._here.wanted = time.monotonic() + seconds, wanted
        try:
            yield
        finally:
            del self._here.until, self._here.wanted

    def left(self, error: type[Exception]) -> float:
        """Seconds; raises `error` once there are none."""
        self._here.wanted()
        seconds = self._here.until - time.monotonic()
        if seconds <= 0:
            raise error
        return seconds


def limited(limit: Limit, connect: float) -> httpcore2.NetworkBackend:
    """Connections that keep to `limit`, and take up to `connect` seconds each to be made."""
    return _Backend(limit, connect)


class _Backend(httpcore2.SyncBackend):
    def __init__(self, limit: Limit, connect: float) -> None:
        self.limit, self.connect = limit, connect

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        seconds = min(self.connect, self.limit.left(httpcore2.ConnectTimeout))
        return _Stream(super().connect_tcp(host, port, seconds, local_address, socket_options), self.limit)


class _Stream(httpcore2.NetworkStream):
    def __init__(self, inner: httpcore2.NetworkStream, limit: Limit) -> None:
        self.inner, self.limit = inner, limit

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            seconds = min(self.limit.slice, self.limit.left(httpcore2.ReadTimeout))
            try:
                return self.inner.read(max_bytes, seconds)
            except httpcore2.ReadTimeout:
                pass

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.inner.write(buffer, self.limit.left(httpcore2.WriteTimeout))

    def close(self) -> None:
        self.inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        seconds = self.limit.left(httpcore2.ConnectTimeout)
        return _Stream(self.inner.start_tls(ssl_context, server_hostname, seconds), self.limit)

    def get_extra_info(self, info: str) -> Any:
        return self.inner.get_extra_info(info)
