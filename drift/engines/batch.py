"""Requests spread over servers: the least loaded first, and the work of one that dies given to the others.

Each server has at most `concurrency` requests in flight. The samples of a server count once it is seen, after the last
of them, to be still the process that was handed the weights. Those of a server that died or was started anew are
sampled again, by whichever server is free: they follow from their seeds, so that they are the same.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from drift.engines import EngineError
from drift.engines.client import Exhausted, Unreachable
from drift.engines.vllm_api import Answer
from drift.engines.vllm_server import RESTARTS, Lost, Request, Restarted, Server

POLL = 1.0  # seconds between two looks at which servers should be asked again


class Fleet(Protocol):
    """The servers, in the order in which equally loaded ones get work."""

    servers: list[Server]

    def set_aside(self, server: Server, error: EngineError) -> bool:
        """Gives it no more work. False if it is the last one that gets any, and therefore stays."""
        ...

    def take_back(self, server: Server) -> None:
        """Gives it work again."""
        ...


class Batch:
    """One batch of requests. `run` it once; without requests it hands the weights over and no more."""

    def __init__(self, fleet: Fleet, requests: Sequence[Request], concurrency: int, bar: Any = None) -> None:
        self.fleet, self.requests, self.concurrency, self.bar = fleet, requests, concurrency, bar
        self.repeated = 0  # times that a server was started anew, and its samples were dropped
        self._waiting = deque(range(len(requests)))
        self._done: dict[int, tuple[Server, Answer]] = {}  # by request
        self._flying: dict[Future[Any], tuple[Server, int | None]] = {}  # None: the server is handed the weights
        self._ready: set[Server] = set()  # they hold the weights
        self._begun = False  # once all do, so that the first of them does not get everything
        self._stops = {server: threading.Event() for server in fleet.servers}
        self._restarts, self._failures = Counter[Server](), Counter[int]()

    def run(self) -> list[Answer]:
        """The answers, in the requests' order. The first error that other servers cannot make good ends all requests."""
        count = len(self.fleet.servers)
        with ThreadPoolExecutor((self.concurrency + 1) * count, "drift-vllm") as pool:
            try:
                while self._submit(pool) or not self._confirmed():
                    lost = not all(server.live for server in self.fleet.servers)
                    for future in wait(self._flying, POLL if lost else None, FIRST_COMPLETED).done:
                        self._collect(future)
            except BaseException:
                for stop in self._stops.values():
                    stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise  # those in flight hang up, by which the server drops them; it may have other clients
        return [self._done[number][1] for number in range(len(self.requests))]

    def _submit(self, pool: ThreadPoolExecutor) -> bool:
        """Gives work to every server that has room; whether anything is in flight."""
        servers = self.fleet.servers
        busy = {server for server, number in self._flying.values() if number is None}
        for server in servers:
            if server not in self._ready | busy and (server.live or server.due):
                server.tried = time.monotonic()
                self._flying[pool.submit(server.prepare, self._stops[server])] = (server, None)
        load = Counter(server for server, number in self._flying.values() if number is not None)
        self._begun = self._begun or all(server in self._ready for server in servers if server.live)
        while self._waiting and self._begun:
            free = [s for s in servers if s.live and s in self._ready and load[s] < self.concurrency]
            if not free:
                break
            server, number = min(free, key=lambda s: load[s]), self._waiting.popleft()
            self._flying[pool.submit(server.send, self.requests[number], self._stops[server])] = (server, number)
            load[server] += 1
        return bool(self._flying)

    def _collect(self, future: Future[Any]) -> None:
        if future not in self._flying:  # its server was set aside, or started anew, meanwhile
            return
        server, number = self._flying.pop(future)
        if not server.live:
            try:
                future.result()
            except EngineError as error:
                self.fleet.set_aside(server, error)  # still
                return
            self.fleet.take_back(server)
            self._ready.add(server)
            return
        try:
            answer = future.result()
        except Restarted:
            self._return(number)
            self._again(server)
        except (Lost, Unreachable, Exhausted) as error:
            self._return(number)
            self._lost(server, error, number)
        else:
            if number is None:
                self._ready.add(server)
            else:
                self._done[number] = (server, answer)
                self._advance(number, 1)

    def _confirmed(self) -> bool:
        """With nothing in flight: whether all samples come from servers that hold the weights still."""
        for server in {server for server, _ in self._done.values()}:
            try:
                if not server.unchanged(self._stops[server]):
                    self._again(server)
            except (Lost, Unreachable) as error:
                self._lost(server, error)
        return len(self._done) == len(self.requests)

    def _again(self, server: Server) -> None:
        """It was started anew: its samples are dropped, and it gets the weights again."""
        self._drop(server)
        self.repeated += 1
        self._restarts[server] += 1
        if self._restarts[server] > RESTARTS:
            times = f"the server was started anew {RESTARTS + 1} times during one batch"
            self._lost(server, Exhausted(f"{server.url}: {times}"))

    def _lost(self, server: Server, error: EngineError, number: int | None = None) -> None:
        if number is not None:
            self._failures[number] += not isinstance(error, Lost)
            if self._failures[number] >= len(self.fleet.servers):
                raise error
        if self.fleet.set_aside(server, error):
            self._drop(server)
        elif not isinstance(error, Lost):  # the last one, which was waited for
            raise error

    def _drop(self, server: Server) -> None:
        """What it samples, or has sampled in this batch, is sampled again."""
        self._stops[server].set()
        self._stops[server] = threading.Event()
        self._ready.discard(server)
        for future, (owner, number) in list(self._flying.items()):
            if owner is server:
                del self._flying[future]
                self._return(number)
        for number, (owner, _) in list(self._done.items()):
            if owner is server:
                del self._done[number]
                self._advance(number, -1)
                self._return(number)

    def _return(self, number: int | None) -> None:
        if number is not None:
            self._waiting.appendleft(number)

    def _advance(self, number: int, sign: int) -> None:
        if self.bar is not None:
            self.bar.advance(sign * len(self.requests[number].places))
