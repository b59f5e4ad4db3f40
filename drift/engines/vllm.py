"""Rollouts from vLLM servers: token ids over HTTP, and the trainer's weights handed over after each step.

Ids and log-probs are the servers' own; nothing is tokenised again. Every sample comes from the weights that `sync` last
saw: a server that died, or was started anew, during a batch loses its samples of that batch, and they are sampled again.

Left out: weights over NCCL (they pass through a folder that both sides read), and starting the servers, which live in an
environment of their own (`server_command`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from drift.config import EngineConfig
from drift.engines import EngineError, Sample, check_prompts, seeds
from drift.engines.batch import Batch
from drift.engines.vllm_api import Answer, server_command
from drift.engines.vllm_server import (
    AGAIN,
    CHAT,
    COMPLETIONS,
    RPC,
    Lost,
    Request,
    Server,
    Weights,
    completion,
    request_settings,
)
from drift.model.policy import Policy
from drift.track import Track

__all__ = ["COMPLETIONS", "RPC", "VLLMEngine", "server_command"]


class VLLMEngine:
    """`generate` on vLLM servers that hold the policy's weights as of the last `sync`.

    Opening it (as a context manager, so that it is closed) asks each server for what training needs and raises
    EngineError if something is missing, or if nobody answers at all. LoRA policies hand over their adapters alone, so
    that the servers have to be started from the same base.

    Of several servers one that does not answer is set aside: the others do its work, and it is asked again now and then.

    tell: called with a line for the reader when a server is set aside or back, and its address if it was just lost.
    """

    def __init__(
        self, policy: Policy, config: EngineConfig, tell: Callable[[str, str | None], None] | None = None
    ) -> None:
        self.policy, self.config, self.tell = policy, config, tell or say
        self.repeated = 0  # times that a server was started anew during a batch, and its samples were drawn again
        self._sampling = threading.Lock()  # held while requests are in flight
        self.weights = Weights(policy, config.folder)
        self.servers: list[Server] = []
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        urls, setting = self.config.addresses, "engine.urls" if self.config.urls else "engine.url"
        first = _rank() % len(urls)  # so that ranks with few requests do not all begin with one server
        for url in urls[first:] + urls[:first]:
            self.servers.append(Server(url, setting, self.weights, self.config, lambda own=url: self._others(own)))
        absent: dict[Server, Lost] = {}
        for server in self.servers:
            try:
                server.check()
            except Lost as error:
                absent[server] = error
        if len(absent) == len(self.servers):
            raise next(iter(absent.values()))
        for server, error in absent.items():
            self.set_aside(server, error)

    def _others(self, url: str) -> bool:
        return any(server.live for server in self.servers if server.url != url)

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections and removes the weights on disk; the servers are left running."""
        for server in self.servers:
            server.client.close()
        self.weights.close()

    @property
    def version(self) -> str | None:
        """Of the weights that the servers are to hold."""
        return self.weights.version

    @property
    def gap(self) -> float:
        """Nats by which log-probs differed after the last handovers, at most."""
        return max(server.gap for server in self.servers)

    @property
    def handovers(self) -> int:
        """Weights handed over, counted for each server."""
        return sum(server.handovers for server in self.servers)

    # --- the servers ---

    def set_aside(self, server: Server, error: EngineError) -> bool:
        """Gives it no more work, and tells of it; False if it is the last one that gets any, and therefore stays."""
        if server.live and not self._others(server.url):
            return False
        reason = str(error).splitlines()[0]
        if server.live or reason != server.failure:
            line = f"{server.url} is set aside, and asked again every {AGAIN:g} s: {reason}"
            self.tell(_of_rank(line), server.url if server.live else None)
        server.live, server.failure, server.tried = False, reason, time.monotonic()
        return True

    def take_back(self, server: Server) -> None:
        """Gives it work again."""
        server.live, server.failure = True, ""
        self.tell(_of_rank(f"{server.url} is back"), None)

    def sync(self) -> None:
        """Hands the policy's weights to every server that does not hold them yet, and compares log-probs.

        Raises EngineError if a server does not sample from them afterwards, RuntimeError while a batch is sampled.
        """
        if not self._sampling.acquire(blocking=False):
            raise RuntimeError(
                "sync: a batch is being sampled, which would come from two policies; wait for its samples"
            )
        try:
            version, before = self.policy.hash(), self.weights.version
            if version != before:
                self.weights.save(version)
            elif all(server.holds for server in self.servers if server.live):
                return
            self._run([], None)
            self.weights.forget(before)
        finally:
            self._sampling.release()

    # --- sampling ---

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        bar: Any = None,
    ) -> list[Sample]:
        """One sample a prompt, in order; temperature 0 is greedy. Equal prompts go as one request for several samples.

        The same call gives the same samples, as far as the server's sums do not depend on how it batches requests.
        With top_p < 1 every log-prob is NaN: the server gives those after the cut, and training needs those before it.
        Raises ValueError for an empty prompt, temperature < 0 or top_p outside (0, 1]; EngineError if the server refuses,
        or stays away.
        """
        self._check(temperature, top_p)
        check_prompts(prompts)
        own, places = seeds(seed, len(prompts)), dict[Any, list[int]]()
        for place, prompt in enumerate(prompts):  # the server refuses several greedy samples
            places.setdefault(tuple(prompt) if temperature > 0 else place, []).append(place)
        requests = []
        for at in places.values():
            body = completion(self.policy, prompts[at[0]], len(at), max_new_tokens, temperature, own[at[0]])
            requests.append(Request(COMPLETIONS, body | {"top_p": top_p}, at))
        samples = [sample for _, sample in self._batch(requests, bar)]
        if top_p < 1:
            for sample in samples:
                sample.logprobs = [math.nan] * len(sample.token_ids)
        return samples

    def chat(
        self,
        conversations: Sequence[list[dict[str, str]]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int | Sequence[int] = 0,
        bar: Any = None,
    ) -> list[tuple[list[int], Sample]]:
        """Like `generate` for messages that the server's own chat template renders: (prompt ids, sample) of each."""
        self._check(temperature)
        own, requests = seeds(seed, len(conversations)), []
        for place, messages in enumerate(conversations):
            body = request_settings(self.policy, 1, max_new_tokens, temperature, own[place])
            body |= {"messages": messages, "logprobs": True, "top_logprobs": 0}
            requests.append(Request(CHAT, body, [place]))
        return self._batch(requests, bar)

    def _check(self, temperature: float, top_p: float = 1.0) -> None:
        if self.version is None:
            raise EngineError("the server holds no weights of this policy yet; call sync() first")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} should be at least 0 and top_p {top_p} in (0, 1]")

    def _batch(self, requests: Sequence[Request], bar: Any) -> list[tuple[list[int], Sample]]:
        """(prompt ids, sample) of each place, in order, all from one version of the weights."""
        with self._sampling:
            answers = self._run(requests, bar)
        done: dict[int, tuple[list[int], Sample]] = {}
        for request, answer in zip(requests, answers):
            done.update(zip(request.places, zip(answer.prompts, answer.samples)))
        return [done[place] for place in sorted(done)]

    def _run(self, requests: Sequence[Request], bar: Any) -> list[Answer]:
        batch = Batch(self, requests, self.config.concurrency, bar)
        try:
            return batch.run()
        finally:
            self.repeated += batch.repeated


def say(line: str, lost: str | None) -> None:
    """On standard error."""
    Track(None, progress=False).say(line)


def _of_rank(line: str) -> str:
    return f"rank {rank}: {line}" if (rank := _rank()) else line


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
