"""JSON over HTTP to one server: a bound on requests in flight, a limit of time for each as a whole, and retries.

Temporary failures (429, 5xx, no answer in time, an answer that was cut off) are retried after an exponential back-off with
jitter. A server that cannot be reached is waited for: it may be starting again. A refused request is not retried.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from drift.engines import EngineError

FIRST_DELAY, LONGEST_DELAY = 0.25, 15.0  # seconds before a second try, and before any
CONNECT, KEPT = 10.0, 4.0  # seconds to connect, and that an idle connection is kept: vLLM closes it after 5
SLICE = 0.5  # seconds after which a request that waits looks whether anybody still wants it


class Refused(EngineError):
    """An answer that says no. `status` is the HTTP status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Unreachable(EngineError):
    """Nobody answers there."""


class Passing(EngineError):
    """A temporary failure."""


class Exhausted(EngineError):
    """Temporary failures, as often as it was tried."""


class Stopped(Exception):
    """Another thread gave up, or the client was closed."""


class Client:
    """One server. Every method may be called from several threads.

    url          http://HOST:PORT, without a path; a proxy is taken from the environment
    concurrency  connections at most
    timeout      seconds for one request, from the connection to the last byte of the answer
    retries      of one request, after temporary failures
    wait         seconds for a server that cannot be reached
    """

    def __init__(self, url: str, *, concurrency: int, timeout: float, retries: int, wait: float) -> None:
        try:
            import httpcore2

            from drift.engines.limit import Limit, limited
        except ImportError as error:
            raise ImportError(
                "engine.kind=vllm needs httpcore2 (pip install httpcore2; Python 3.11 or later)"
            ) from error
        self.url, self.retries, self.wait, self.timeout = url.rstrip("/"), retries, wait, timeout
        self._http, self._limit, self._closed = httpcore2, Limit(SLICE), threading.Event()
        key = os.environ.get("VLLM_API_KEY")  # as the server itself reads it
        self._headers = [("Content-Type", "application/json"), *([("Authorization", f"Bearer {key}")] if key else [])]
        where = urlsplit(self.url)
        proxies = {} if proxy_bypass(where.netloc) else getproxies()
        proxy = proxies.get(where.scheme) or proxies.get("all")
        self._pool = httpcore2.ConnectionPool(
            max_connections=concurrency,
            max_keepalive_connections=concurrency,
            keepalive_expiry=KEPT,
            proxy=httpcore2.Proxy(proxy) if proxy else None,
            network_backend=limited(self._limit, CONNECT),
        )

    def close(self) -> None:
        """Ends requests in flight, which raise Stopped, and closes the connections."""
        self._closed.set()
        self._pool.close()

    def once(self, path: str, body: Any = None, stop: threading.Event | None = None) -> Any:
        """GET, or POST if there is a body; the answer as JSON, or as text if it is not JSON.

        Raises Unreachable, Passing or Refused; Stopped once `stop` is set or the client is closed.
        """
        where, http = f"{self.url}{path}", self._http

        def wanted() -> None:
            if self._closed.is_set() or (stop is not None and stop.is_set()):
                raise Stopped

        wanted()
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        try:
            with self._limit(self.timeout, wanted):
                answer = self._pool.request(
                    method,
                    where,
                    headers=self._headers,
                    content=content,
                    extensions={"timeout": {"pool": self.timeout}},
                )
        except (
            http.ConnectError,
            http.ConnectTimeout,
            http.ReadError,
            http.WriteError,
            http.RemoteProtocolError,
        ) as error:
            wanted()
            raise Unreachable(f"{where}: {_name(error)}") from error  # before or amid the answer
        except http.TimeoutException as error:
            raise Passing(f"{where}: no whole answer within engine.timeout={self.timeout:g} s") from error
        except (http.ProxyError, http.ProtocolError, http.UnsupportedProtocol) as error:
            raise Refused(f"{where}: {_name(error)}", 0) from error
        text, status = answer.content.decode(errors="replace"), answer.status
        if status == 429 or status >= 500:
            raise Passing(f"{where}: HTTP {status}: {_said(text)}")
        if status >= 400:
            raise Refused(f"{where}: HTTP {status}: {_said(text)}", status)
        try:
            return json.loads(text)
        except ValueError:
            return text

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        read: Callable[[Any], Any] = lambda answer: answer,
        after_failure: Callable[[], None] = lambda: None,
        stop: threading.Event | None = None,
    ) -> Any:
        """`read` of the answer, after as many tries as it takes; `read` may raise Passing.

        after_failure  is called before each further try and before Refused is raised; its errors end the request
        stop           once set, a try ends and no further one is made: Stopped is raised
        """
        stop, failures, tries, gone_since = stop or threading.Event(), 0, 0, None
        while True:
            try:
                return read(self.once(path, body, stop))
            except Refused:
                with suppress(Unreachable, Passing):
                    after_failure()
                raise
            except Unreachable as error:
                now = time.monotonic()
                gone_since = now if gone_since is None else gone_since
                if now - gone_since >= self.wait:
                    raise Unreachable(f"{error}; it was waited for over engine.wait={self.wait:g} s") from error
            except Passing as error:
                gone_since, tries = None, tries + 1
                if tries > self.retries:
                    raise Exhausted(f"{error}; it was tried {tries} times (engine.retries={self.retries})") from error
            failures += 1
            if stop.wait(backoff(failures)):
                raise Stopped
            with suppress(Unreachable, Passing):  # the next try will tell
                after_failure()


def backoff(tries: int) -> float:
    """Seconds to wait after so many failures: twice as long each time, and between half of that and all of it by chance."""
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(tries - 1, 30)) * random.uniform(0.5, 1.0)


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _said(text: str) -> str:
    """The start of an error's text; vLLM and OpenAI put a message inside."""
    said: Any = text
    with suppress(ValueError, AttributeError):
        content = json.loads(text)
        error = content.get("error", content)
        said = error["message"] if isinstance(error, dict) and "message" in error else error
    return " ".join(str(said).split())[:500] or "no text"
