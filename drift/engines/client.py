"""JSON over HTTP to one server: a bound on requests in flight, time-outs, and retries.

What may pass (429, 5xx, no answer in time, an answer that was cut off) is tried again after an exponential back-off with
jitter. A server that cannot be reached is waited for: it may be starting again. What it refuses is not tried again.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from drift.engines import EngineError

FIRST_DELAY, LONGEST_DELAY = 0.25, 15.0  # seconds before a second try, and before any


class Refused(EngineError):
    """An answer that says no. `status` is the HTTP status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Unreachable(EngineError):
    """Nobody answers there."""


class Passing(EngineError):
    """May go better next time."""


class Stopped(Exception):
    """Another thread gave up."""


class Client:
    """One server. Every method may be called from several threads.

    url          http://HOST:PORT, without a path
    concurrency  connections at most
    timeout      seconds for one answer
    retries      of one request, for what may pass
    wait         seconds for a server that cannot be reached
    """

    def __init__(self, url: str, *, concurrency: int, timeout: float, retries: int, wait: float) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise ImportError("engine.kind=vllm needs httpx2 (pip install httpx2; Python 3.11 or later)") from error
        self.url, self.retries, self.wait, self.timeout = url.rstrip("/"), retries, wait, timeout
        self._errors = httpx2
        key = os.environ.get("VLLM_API_KEY")  # as the server itself reads it
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def once(self, path: str, body: Any = None) -> Any:
        """GET, or POST where there is a body; the answer as JSON, or as text where it is none.

        Raises Unreachable, Passing or Refused.
        """
        where, http = f"{self.url}{path}", self._errors
        cut_off = (
            http.ReadError,
            http.WriteError,
            http.CloseError,
            http.RemoteProtocolError,
        )  # before or amid the answer
        try:
            answer = self._http.get(path) if body is None else self._http.post(path, json=body)
        except (http.ConnectError, http.ConnectTimeout, *cut_off) as error:
            raise Unreachable(f"{where}: {_name(error)}") from error
        except http.TimeoutException as error:
            raise Passing(f"{where}: no answer within engine.timeout={self.timeout:g} s") from error
        except (http.HTTPError, http.InvalidURL) as error:
            raise Refused(f"{where}: {_name(error)}", 0) from error
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Passing(f"{where}: HTTP {answer.status_code}: {_said(answer)}")
        if answer.status_code >= 400:
            raise Refused(f"{where}: HTTP {answer.status_code}: {_said(answer)}", answer.status_code)
        try:
            return answer.json()
        except ValueError:
            return answer.text

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

        after_failure  is called before each further try and before Refused is raised; what it raises ends the request
        stop           once set, no further try is made: Stopped is raised
        """
        stop, failures, tries, gone_since = stop or threading.Event(), 0, 0, None
        while True:
            try:
                return read(self.once(path, body))
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
                    raise EngineError(f"{error}; it was tried {tries} times (engine.retries={self.retries})") from error
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


def _said(answer: Any) -> str:
    """The start of an error's text; vLLM and OpenAI put a message inside."""
    try:
        content = answer.json()
        error = content.get("error", content)
        text = error["message"] if isinstance(error, dict) and "message" in error else error
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(str(text).split())[:500] or "no text"
