"""One vLLM server: asked for what training needs, handed the policy's weights, compared with it, and sampled from.

The weights carry a version, which the server tells (`vllm_worker`). After every handover the server's log-probs are
compared with the policy's, since there are ways to load weights wrongly without an error.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drift.config import EngineConfig
from drift.engines import EngineError
from drift.engines.client import Client, Exhausted, Passing, Refused, Unreachable
from drift.engines.vllm_api import Answer, State, read_answer, read_state, server_command
from drift.model.policy import Policy

COMPLETIONS, CHAT, RPC = "/v1/completions", "/v1/chat/completions", "/collective_rpc"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats, between two implementations of the same model
PROBES, PROBE_LENGTH, PROBE_SAMPLES, PROBE_TEMPERATURE = 4, 12, 8, 0.5
RESTARTS = 3  # of a server, during one handover or one batch
AGAIN = 30.0  # seconds after which a server that was set aside is asked again


class Restarted(Exception):
    """The server holds other weights than it should."""


class Lost(EngineError):
    """Nobody answers, and other servers can take its work."""


@dataclass(frozen=True)
class Request:
    path: str
    body: dict[str, Any]
    places: list[int]  # of its samples in the batch


class Weights:
    """The policy's weights as of the last `save`, in a folder that servers read, and the policy's logits with them."""

    def __init__(self, policy: Policy, folder: str | None) -> None:
        self.policy = policy
        self.lora = hasattr(policy.model, "peft_config")
        self.version: str | None = None  # the weights' hash; None before the first `save`
        self.probes = _probe_prompts(policy)
        self.logits = torch.empty(0)  # [P, V] after each probe
        self.vocabulary = policy.head().weight.shape[0]
        self._place = tempfile.TemporaryDirectory(prefix="drift-weights-", dir=folder)

    def close(self) -> None:
        """Removes the folder."""
        self._place.cleanup()

    def folder(self, version: str | None) -> Path:
        """A new one for each version: vLLM's cache of prefixes knows adapters by their path."""
        return Path(self._place.name) / str(version)

    def save(self, version: str) -> None:
        """Writes the policy's weights, which have this hash; older ones stay until `forget`."""
        self.policy.model.save_pretrained(self.folder(version))
        ids = torch.tensor(self.probes, device=self.policy.device)
        with self.policy.inference():
            logits = self.policy.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        self.logits, self.version = logits.float().cpu(), version

    def forget(self, version: str | None) -> None:
        """Removes older weights."""
        if version not in (None, self.version):
            shutil.rmtree(self.folder(version))


class Server:
    """One server, and the weights that it was last handed.

    setting  "engine.url" or "engine.urls", for errors
    others   whether another server could take this one's work: then this one is not waited for, and Lost is raised
    """

    def __init__(
        self, url: str, setting: str, weights: Weights, config: EngineConfig, others: Callable[[], bool]
    ) -> None:
        self.url, self.setting, self.weights, self.config, self.others = url, setting, weights, config, others
        limits = {name: getattr(config, name) for name in ("concurrency", "timeout", "retries", "wait")}
        self.client = Client(url, **limits)
        self.base = ""  # the served model's name; "" before `check`
        self.live, self.failure = True, ""  # whether it gets work, and the reason why not
        self.tried = 0.0  # when it was last asked, while it is set aside
        self.gap = 0.0  # nats by which log-probs differed after the last handover, at most
        self.handovers = 0
        self._state: State | None = None  # the server, when it was last handed weights
        self._held: str | None = None  # the version that it was last handed

    @property
    def model(self) -> str:
        """The name that requests ask for: the served model, or the adapters of this version on it."""
        weights = self.weights
        return _adapter(weights.version) if weights.lora and weights.version else self.base

    @property
    def holds(self) -> bool:
        """Whether it was handed the weights of this version, as far as is known without asking."""
        return self._state is not None and self._state.version == self.weights.version

    @property
    def due(self) -> bool:
        """Whether a server that was set aside should be asked again."""
        return time.monotonic() - self.tried >= AGAIN

    # --- weights ---

    def prepare(self, stop: threading.Event) -> None:
        """Hands the weights over, unless the server holds them.

        Raises EngineError if the server does not sample from them afterwards.
        """
        if not self.base:
            self.check()
        if not self.holds or not self.unchanged(stop):
            self._hand_over(stop)

    def unchanged(self, stop: threading.Event) -> bool:
        """Whether it is still the process that was handed the weights, and holds them."""
        return self._ask_state(stop) == self._state

    def _hand_over(self, stop: threading.Event) -> None:
        """Loads the weights as they were saved, and compares, even if the server starts anew meanwhile.

        Those that another rank, or an earlier stage, has handed over are not loaded again.
        """
        version = self.weights.version
        assert version is not None
        try:
            for _ in range(RESTARTS):
                found = self._ask_state(stop)
                self._state = State(found.start, version, found.vocabulary)
                with suppress(Restarted):
                    held = found.version == version
                    if not held:
                        self._load(version, stop)
                    self._compare(stop)
                    if self.unchanged(stop):
                        self.handovers += not held
                        self._held = version
                        return
            raise Exhausted(f"{self.url}: the server was started anew {RESTARTS} times while it got its weights")
        except BaseException:
            self._state = None  # so that nothing is sampled before a handover that succeeds
            raise

    def _load(self, version: str, stop: threading.Event) -> None:
        folder = self.weights.folder(version)
        if self.weights.lora:  # by a name of its own: loading in place reads the file again in every step (vLLM 0.32)
            self._load_adapter(folder, version, stop)
        else:
            try:
                self._call(stop, "drift_load", str(folder), version)
            except (Unreachable, Lost):
                raise
            except EngineError as error:
                what = "it has to see that folder, and to serve a model of the policy's shape"
                raise self._unfit(f"it does not take up the weights in {folder} ({error}); {what}") from error
        done = self._ask(stop, "/reset_prefix_cache?reset_running_requests=true", {})
        if not (isinstance(done, dict) and done.get("success", True)):
            raise EngineError(f"{self.url}: the cache of prefixes could not be cleared, and holds the old weights")
        self._call(stop, "drift_mark", version)  # last: whoever finds this version there need do nothing

    def _load_adapter(self, folder: Path, version: str, stop: threading.Event) -> None:
        try:
            self._ask(stop, "/v1/load_lora_adapter", {"lora_name": _adapter(version), "lora_path": str(folder)})
            if self._held not in (None, version):
                self._ask(stop, "/v1/unload_lora_adapter", {"lora_name": _adapter(self._held)})
        except Refused as error:
            there = "already been loaded" in str(error) or "cannot be found" in str(error)  # before or after a restart
            if not there:
                raise self._unfit(f"it does not take adapters at run time ({error})") from error

    def _compare(self, stop: threading.Event) -> None:
        """The server's log-probs of its samples against the policy's, on a few prompts."""
        probes = self.weights.probes
        how = (PROBE_SAMPLES, 1, PROBE_TEMPERATURE)
        bodies = [completion(self.weights.policy, prompt, *how, seed=i) for i, prompt in enumerate(probes)]
        found = [self.send(Request(COMPLETIONS, body, list(range(PROBE_SAMPLES))), stop).samples for body in bodies]
        ids = torch.tensor([[sample.token_ids[0] for sample in samples] for samples in found])
        theirs = torch.tensor([[sample.logprobs[0] for sample in samples] for samples in found])
        logits = self.weights.logits
        ours, raw = (torch.log_softmax(logits / t, -1).gather(1, ids) for t in (PROBE_TEMPERATURE, 1.0))
        self.gap = float((theirs - ours).abs().max())
        tolerance = self.config.tolerance or TOLERANCE.get(self.weights.policy.head().weight.dtype, 0.1)
        if self.gap <= tolerance:
            return
        if not self.unchanged(stop):  # it was started anew between two probes, and holds its first weights
            raise Restarted
        if float((theirs - raw).abs().max()) <= tolerance:
            raise self._unfit(
                "its log-probs are those before temperature; --logprobs-mode processed_logprobs gives those after"
            )
        base = "the base that adapters belong to, " if self.weights.lora else ""
        raise self._unfit(
            f"after weights {self.weights.version} were handed over, its log-probs differ from the policy's by up to "
            f"{self.gap:.2g} nats (engine.tolerance={tolerance:g}): it does not sample from the policy. It should be "
            f"started from {base}a model of the same shape, dtype and rope settings, with drift's worker extension"
        )

    # --- sampling ---

    def send(self, request: Request, stop: threading.Event) -> Answer:
        """The answer. Raises Restarted if this is not the server any more that was handed the weights."""

        def read(answer: Any) -> Answer:
            return self._read(answer, len(request.places), request.body.get("prompt"), request.path)

        body = {"model": self.model, **request.body}
        return self.client.ask(request.path, body, read=read, after_failure=self._look, stop=stop)

    def _look(self) -> None:
        """After a failure: is this still the server that was handed the weights?"""
        if self._reached() != self._state:
            raise Restarted

    def _reached(self) -> State:
        """Its state, without a second try."""
        try:
            return read_state(self.client.once(RPC, {"method": "drift_state"}))
        except Unreachable as error:
            if self.others():
                raise Lost(str(error)) from error
            raise

    # --- the server ---

    def check(self) -> None:
        """Asks for a sample and for the workers' state, and refuses a server that lacks anything. Lost: nobody answers."""
        try:
            listed = self.client.once("/v1/models")
            base = str(listed["data"][0]["id"])
        except Unreachable as error:
            raise Lost(str(self._unfit(f"nobody answers ({error})"))) from error
        except (Refused, Passing, LookupError, TypeError):  # the next requests tell more
            base = str(self.weights.policy.causal_lm.config.name_or_path)
        try:
            try:
                self._compatible(base)
            except Unreachable:  # the connection that is kept may have been closed after an error
                self._compatible(base)
            state = read_state(self.client.once(RPC, {"method": "drift_state"}))
        except EngineError as error:
            raise self._unfit(f"it lacks what training needs: {error}") from error
        if state.vocabulary != (own := self.weights.vocabulary):
            raise self._unfit(f"its model {base!r} has a vocabulary of {state.vocabulary}, the policy one of {own}")
        self.base = base

    def _compatible(self, base: str) -> None:
        prompt, n = self.weights.probes[0], 2
        answer = self.client.once(
            COMPLETIONS, {"model": base, **completion(self.weights.policy, prompt, n, 1, 1.0, seed=0)}
        )
        self._read(answer, n, prompt, COMPLETIONS)

    def _read(self, answer: Any, n: int, prompt: list[int] | None, path: str) -> Answer:
        return read_answer(answer, n, self.weights.policy.eos_ids, prompt, path, self.weights.vocabulary)

    def _ask(self, stop: threading.Event, path: str, body: Any, **options: Any) -> Any:
        def after_failure() -> None:
            if self.others():
                self._reached()

        return self.client.ask(path, body, after_failure=after_failure, stop=stop, **options)

    def _ask_state(self, stop: threading.Event) -> State:
        return self._ask(stop, RPC, {"method": "drift_state"}, read=read_state)

    def _call(self, stop: threading.Event, method: str, *arguments: str) -> None:
        self._ask(stop, RPC, {"method": method, "args": list(arguments)})

    def _unfit(self, reason: str) -> EngineError:
        policy = self.weights.policy
        settings = policy.causal_lm.config
        rank = max(adapter.r for adapter in policy.model.peft_config.values()) if self.weights.lora else 0
        start = server_command(
            str(settings.name_or_path or "MODEL"),
            url=self.url,
            dtype=str(policy.head().weight.dtype).removeprefix("torch."),
            lora_rank=rank,
            cpu=policy.device.type == "cpu",
        )
        return EngineError(
            f"{self.setting}={self.url}: {reason}.\nA server that can be used is started, in vLLM's environment with drift "
            f"on PYTHONPATH, by\n  {start} (docs/engines.md)"
        )


def request_settings(policy: Policy, n: int, limit: int, temperature: float, seed: int) -> dict[str, Any]:
    """Everything that shapes the distribution, so that none of it comes from the server's defaults."""
    return {
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
        "stop_token_ids": sorted(policy.eos_ids),
        "return_token_ids": True,
    }


def completion(policy: Policy, prompt: list[int], n: int, limit: int, temperature: float, seed: int) -> dict[str, Any]:
    """The body of a request for n continuations, without the model's name."""
    return {**request_settings(policy, n, limit, temperature, seed), "prompt": prompt, "logprobs": 0}


def _adapter(version: str | None) -> str:
    return f"drift-{version}"


def _probe_prompts(policy: Policy) -> list[list[int]]:
    """Ids from all over the vocabulary, so that a wrong row of any matrix has a chance to show."""
    known = min(
        len(policy.tokenizer), policy.head().weight.shape[0]
    )  # a tokenizer may know tokens that the model does not
    return np.random.default_rng(0).integers(known, size=(PROBES, PROBE_LENGTH)).tolist()
