"""Rollouts from a vLLM server: token ids over HTTP, and the trainer's weights handed over after each step.

Ids and log-probs are the server's own; nothing is tokenised again. Every sample comes from the weights that `sync` last
saw: they carry a version, which the server tells (`vllm_worker`), and a batch during which the server was started anew
gets its weights and is sampled again as a whole. After every handover the server's log-probs are compared with the
policy's, since there are ways to load weights wrongly without an error.

Left out: weights over NCCL (they pass through a folder that both sides read), and starting the server, which lives in an
environment of its own (`server_command`).
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drift.config import EngineConfig
from drift.engines import EngineError, Sample, check_prompts, seeds
from drift.engines.client import Client, Passing, Refused, Unreachable
from drift.engines.vllm_api import Answer, State, read_answer, read_state, server_command
from drift.model.policy import Policy

__all__ = ["VLLMEngine", "server_command"]

COMPLETIONS, CHAT, RPC = "/v1/completions", "/v1/chat/completions", "/collective_rpc"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats, between two implementations of the same model
PROBES, PROBE_LENGTH, PROBE_SAMPLES, PROBE_TEMPERATURE = 4, 12, 8, 0.5
RESTARTS = 3  # of the server, during one batch


class Restarted(Exception):
    """The server holds other weights than it should."""


@dataclass(frozen=True)
class _Request:
    path: str
    body: dict[str, Any]
    places: list[int]  # of its samples in the batch


class VLLMEngine:
    """`generate` on a vLLM server that holds the policy's weights as of the last `sync`.

    Opening it (as a context manager, so that it is closed) asks the server for what training needs and raises
    EngineError, in words, where something is missing. LoRA policies hand over their adapters alone, so that the server
    has to be started from the same base.
    """

    def __init__(self, policy: Policy, config: EngineConfig) -> None:
        self.policy, self.config = policy, config
        self.lora = hasattr(policy.model, "peft_config")
        limits = {name: getattr(config, name) for name in ("concurrency", "timeout", "retries", "wait")}
        self.client = Client(config.url, **limits)
        self.version: str | None = None  # of the weights that the server is to hold
        self.gap = 0.0  # nats by which log-probs differed after the last handover, at most
        self.handovers, self.repeated = 0, 0  # weights handed over, batches sampled again
        self._state: State | None = None  # the server, when it was last handed weights
        self._sampling = threading.Lock()  # held while requests are in flight
        self._handover = tempfile.TemporaryDirectory(prefix="drift-weights-", dir=config.folder)
        self._probes = _probe_prompts(policy)
        self._logits = torch.empty(0)  # [P, V] after each probe, of the weights of `version`
        self.base = ""  # the served model's name
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections and removes the weights on disk; the server is left running."""
        self.client.close()
        self._handover.cleanup()

    @property
    def model(self) -> str:
        """The name that requests ask for: the served model, or the adapters of this version on it."""
        return _adapter(self.version) if self.lora and self.version else self.base

    # --- weights ---

    def sync(self) -> None:
        """Hands the policy's weights over, unless the server holds these already, and compares log-probs.

        Raises EngineError if the server does not sample from them afterwards, RuntimeError while a batch is sampled.
        """
        if not self._sampling.acquire(blocking=False):
            raise RuntimeError(
                "sync: a batch is being sampled, which would come from two policies; wait for its samples"
            )
        try:
            self._sync(self.policy.hash())
        finally:
            self._sampling.release()

    def _sync(self, version: str) -> None:
        if version == self.version and self._state is not None:
            return
        folder, before = self._folder(version), self.version
        self.policy.model.save_pretrained(folder)
        self._logits = self._own_logits()
        self.version = version
        self._hand_over(before)
        if before not in (None, version):
            shutil.rmtree(self._folder(before))

    def _folder(self, version: str | None) -> Path:
        """A new one for each version: vLLM's cache of prefixes knows adapters by their path."""
        return Path(self._handover.name) / str(version)

    def _hand_over(self, before: str | None = None) -> None:
        """Loads the weights of `version` as they were saved, and compares, even if the server starts anew meanwhile.

        Those that another rank, or an earlier stage, has handed over are not loaded again.
        """
        assert self.version is not None
        try:
            for _ in range(RESTARTS):
                found = self._ask_state()
                self._state = State(found.start, self.version, found.vocabulary)
                with suppress(Restarted):
                    held = found.version == self.version
                    if not held:
                        self._load(self._folder(self.version), self.version, before)
                    self._compare()
                    if self._ask_state() == self._state:
                        self.handovers += not held
                        return
            raise EngineError(
                f"{self.client.url}: the server was started anew {RESTARTS} times while it got its weights"
            )
        except BaseException:
            self._state = None  # so that nothing is sampled before a handover that succeeds
            raise

    def _load(self, folder: Path, version: str, before: str | None) -> None:
        if self.lora:  # by a name of its own: loading in place reads the file again in every step (vLLM 0.32)
            self._load_adapter(folder, version, before)
        else:
            try:
                self._call("drift_load", str(folder), version)
            except Unreachable:
                raise
            except EngineError as error:
                what = "it has to see that folder, and to serve a model of the policy's shape"
                raise self._unfit(f"it does not take up the weights in {folder} ({error}); {what}") from error
        done = self.client.ask("/reset_prefix_cache?reset_running_requests=true", {})
        if not (isinstance(done, dict) and done.get("success", True)):
            raise EngineError(
                f"{self.client.url}: the cache of prefixes could not be cleared, and holds the old weights"
            )
        self._call("drift_mark", version)  # last: whoever finds this version there need do nothing

    def _load_adapter(self, folder: Path, version: str, before: str | None) -> None:
        try:
            self.client.ask("/v1/load_lora_adapter", {"lora_name": _adapter(version), "lora_path": str(folder)})
            if before is not None:
                self.client.ask("/v1/unload_lora_adapter", {"lora_name": _adapter(before)})
        except Refused as error:
            there = "already been loaded" in str(error) or "cannot be found" in str(error)  # before or after a restart
            if not there:
                raise self._unfit(f"it does not take adapters at run time ({error})") from error

    def _compare(self) -> None:
        """The server's log-probs of what it samples against the policy's, on a few prompts."""
        bodies = [self._body(p, PROBE_SAMPLES, 1, PROBE_TEMPERATURE, seed=i) for i, p in enumerate(self._probes)]
        found = [self._send(_Request(COMPLETIONS, body, list(range(PROBE_SAMPLES)))).samples for body in bodies]
        ids = torch.tensor([[sample.token_ids[0] for sample in samples] for samples in found])
        theirs = torch.tensor([[sample.logprobs[0] for sample in samples] for samples in found])
        ours, raw = (torch.log_softmax(self._logits / t, -1).gather(1, ids) for t in (PROBE_TEMPERATURE, 1.0))
        self.gap = float((theirs - ours).abs().max())
        tolerance = self.config.tolerance or TOLERANCE.get(self.policy.head().weight.dtype, 0.1)
        if self.gap <= tolerance:
            return
        if self._ask_state() != self._state:  # it was started anew between two probes, and holds its first weights
            raise Restarted
        if float((theirs - raw).abs().max()) <= tolerance:
            raise self._unfit(
                "its log-probs are those before temperature; --logprobs-mode processed_logprobs gives those after"
            )
        base = "the base that adapters belong to, " if self.lora else ""
        raise self._unfit(
            f"after weights {self.version} were handed over, its log-probs differ from the policy's by up to "
            f"{self.gap:.2g} nats (engine.tolerance={tolerance:g}): it does not sample from the policy. It should be "
            f"started from {base}a model of the same shape, dtype and rope settings, with drift's worker extension"
        )

    def _own_logits(self) -> torch.Tensor:
        ids = torch.tensor(self._probes, device=self.policy.device)
        with self.policy.inference():
            return self.policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].float().cpu()

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
            body = self._body(prompts[at[0]], len(at), max_new_tokens, temperature, own[at[0]])
            requests.append(_Request(COMPLETIONS, body | {"top_p": top_p}, at))
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
            body = self._settings(1, max_new_tokens, temperature, own[place])
            body |= {"messages": messages, "logprobs": True, "top_logprobs": 0}
            requests.append(_Request(CHAT, body, [place]))
        return self._batch(requests, bar)

    def _check(self, temperature: float, top_p: float = 1.0) -> None:
        if self.version is None:
            raise EngineError("the server holds no weights of this policy yet; call sync() first")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature {temperature} should be at least 0 and top_p {top_p} in (0, 1]")

    def _body(self, prompt: list[int], n: int, limit: int, temperature: float, seed: int) -> dict[str, Any]:
        return {**self._settings(n, limit, temperature, seed), "prompt": prompt, "logprobs": 0}

    def _settings(self, n: int, limit: int, temperature: float, seed: int) -> dict[str, Any]:
        """Everything that shapes the distribution, so that none of it comes from the server's defaults."""
        return {
            "model": self.model,
            "n": n,
            "max_tokens": limit,
            "temperature": temperature,
            "seed": seed,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self.policy.eos_ids),
            "return_token_ids": True,
        }

    def _batch(self, requests: Sequence[_Request], bar: Any) -> list[tuple[list[int], Sample]]:
        """(prompt ids, sample) of each place, in order, all from one version of the weights."""
        with self._sampling:
            return self._batch_of_one_version(requests, bar)

    def _batch_of_one_version(self, requests: Sequence[_Request], bar: Any) -> list[tuple[list[int], Sample]]:
        for _ in range(RESTARTS + 1):
            if self._ask_state() != self._state:
                self._hand_over()
            done: dict[int, tuple[list[int], Sample]] = {}
            with suppress(Restarted):
                self._send_all(requests, done, bar)
                if self._ask_state() == self._state:
                    return [done[place] for place in sorted(done)]
            self.repeated += 1
            if bar is not None:
                bar.advance(-len(done))
        raise EngineError(f"{self.client.url}: the server was started anew {RESTARTS + 1} times during one batch")

    def _send_all(self, requests: Sequence[_Request], done: dict[int, tuple[list[int], Sample]], bar: Any) -> None:
        """Fills `done`, with at most `concurrency` requests in flight. The first that fails ends the others."""
        stop = threading.Event()
        with ThreadPoolExecutor(self.config.concurrency, "drift-vllm") as pool:
            futures = {pool.submit(self._send, request, stop): request for request in requests}
            try:
                for future in as_completed(futures):
                    request, answer = futures[future], future.result()
                    done.update(zip(request.places, zip(answer.prompts, answer.samples)))
                    if bar is not None:
                        bar.advance(len(request.places))
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise  # those in flight hang up, by which the server drops them; it may have other clients

    def _send(self, request: _Request, stop: threading.Event | None = None) -> Answer:
        def read(answer: Any) -> Answer:
            return self._read(answer, len(request.places), request.body.get("prompt"), request.path)

        return self.client.ask(request.path, request.body, read=read, after_failure=self._look, stop=stop)

    def _look(self) -> None:
        """After a failure: is this still the server that was handed the weights?"""
        if self._current_state() != self._state:
            raise Restarted

    # --- the server ---

    def _connect(self) -> None:
        """Asks for a sample and for the workers' state, and refuses a server that lacks anything."""
        try:
            listed = self.client.once("/v1/models")
            self.base = str(listed["data"][0]["id"])
        except Unreachable as error:
            raise self._unfit(f"nobody answers ({error})") from error
        except (Refused, Passing, LookupError, TypeError):  # what it is asked for next tells more
            self.base = str(self.policy.causal_lm.config.name_or_path)
        try:
            try:
                self._compatible()
            except Unreachable:  # the connection that is kept may have been closed after an error
                self._compatible()
            state = self._current_state()
        except EngineError as error:
            raise self._unfit(f"it lacks what training needs: {error}") from error
        if state.vocabulary != (own := self.policy.head().weight.shape[0]):
            raise self._unfit(
                f"its model {self.base!r} has a vocabulary of {state.vocabulary}, the policy one of {own}"
            )

    def _compatible(self) -> None:
        prompt, n = self._probes[0], 2
        answer = self.client.once(COMPLETIONS, self._body(prompt, n, 1, 1.0, seed=0))
        self._read(answer, n, prompt, COMPLETIONS)

    def _read(self, answer: Any, n: int, prompt: list[int] | None, path: str) -> Answer:
        return read_answer(answer, n, self.policy.eos_ids, prompt, path, self.policy.head().weight.shape[0])

    def _ask_state(self) -> State:
        return self.client.ask(RPC, {"method": "drift_state"}, read=read_state)

    def _current_state(self) -> State:
        """Without a second try."""
        return read_state(self.client.once(RPC, {"method": "drift_state"}))

    def _call(self, method: str, *arguments: str) -> None:
        self.client.ask(RPC, {"method": method, "args": list(arguments)})

    def _unfit(self, reason: str) -> EngineError:
        settings = self.policy.causal_lm.config
        rank = max(adapter.r for adapter in self.policy.model.peft_config.values()) if self.lora else 0
        start = server_command(
            str(settings.name_or_path or "MODEL"),
            url=self.config.url,
            dtype=str(self.policy.head().weight.dtype).removeprefix("torch."),
            lora_rank=rank,
            cpu=self.policy.device.type == "cpu",
        )
        return EngineError(
            f"engine.url={self.config.url}: {reason}.\nA server that can be used is started, in vLLM's environment with drift "
            f"on PYTHONPATH, by\n  {start} (docs/engines.md)"
        )


def _adapter(version: str) -> str:
    return f"drift-{version}"


def _probe_prompts(policy: Policy) -> list[list[int]]:
    """Ids from all over the vocabulary, so that a wrong row of any matrix has a chance to show."""
    known = min(
        len(policy.tokenizer), policy.head().weight.shape[0]
    )  # a tokenizer may know tokens that the model does not
    return np.random.default_rng(0).integers(known, size=(PROBES, PROBE_LENGTH)).tolist()
