"""One step ahead: the next step's rollouts, on a thread, from weights that stand still while the policy trains.

The thread samples, verifies and gives feedback; it issues no collective and touches neither the policy nor its
tokenizer. Its samples follow from its weights and seed alone, so that threads change the time of events and no
result: a training equals, bit for bit, one that samples each batch before it trains on the one before.

Left out: more than one step ahead, and weights that change within a trajectory.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import torch

from drift.engines import Engine, Sample, remembering
from drift.engines.hf import HFEngine
from drift.model.policy import Policy

PATIENCE = 5.0  # seconds that `close` gives a thread to notice; one that waits for a server is left behind


class Stopped(Exception):
    """Raised inside the thread once nobody waits for it any more."""


class Ahead:
    """At most one call at a time, on a second thread. `close` it in any case.

    device: where the call's tensors are; a thread has to be told its GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stop = device, threading.Event()
        self._thread: threading.Thread | None = None
        self._outcome: Future[Any] | None = None

    def start(self, call: Callable[[], Any]) -> None:
        """Begins the call. Raises RuntimeError if the outcome of the last one was not fetched."""
        if self._outcome is not None:
            raise RuntimeError("the call before this one was not waited for")
        self._outcome = outcome = Future()

        def run() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                outcome.set_result(call())
            except BaseException as error:
                outcome.set_exception(error)

        self._thread = threading.Thread(target=run, name="drift-ahead", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises the call's error, if there is one by now, with its traceback; does not wait."""
        if self._outcome is not None and self._outcome.done():
            self._outcome.result()

    def result(self) -> Any:
        """Waits for the call and returns its result, or raises its error. Ctrl-C ends the waiting."""
        if self._outcome is None:
            raise RuntimeError("no call was started")
        found = self._outcome.result()
        self._outcome = None
        return found

    def close(self) -> None:
        """Asks a call that still runs to stop, at its next token or request, and waits a little for that."""
        self.stop.set()
        if self._thread is not None:
            self._thread.join(PATIENCE)


class Still:
    """An engine whose weights are those of the last `sync`, independent of the policy's.

    `HFEngine` samples from the policy's own memory, so it gets a copy of the trained parameters (a base that LoRA leaves
    frozen is shared); other engines hold weights of their own already. `policy` is what the thread tokenises with, by a
    tokenizer that is its own. Once `stop` is set, `generate` raises Stopped.

    still: the policy's own parameters stand still, since others are trained (`drift.training.sharding`), and are not copied.
    """

    def __init__(self, engine: Engine, policy: Policy, stop: threading.Event, still: bool = False) -> None:
        self.engine, self.stop = engine, stop
        self._live: Policy | None = None
        model, tokenizer = policy.model, copy.deepcopy(policy.tokenizer)
        if isinstance(engine, HFEngine):
            live = engine.policy.model
            self._live = None if still else engine.policy
            model = copy.deepcopy(live, {id(p): p for p in live.parameters() if still or not p.requires_grad})
            # requires_grad stays as it is in the policy: without it torch takes other products, with other last bits
            model.register_forward_pre_hook(lambda *_: self._check())
            self.engine = copy.copy(engine)
            self.engine.policy = Policy(model, tokenizer)
        self.policy = Policy(model, tokenizer)

    def sync(self) -> None:
        """From here on, samples from the policy's weights as they are now."""
        if self._live is None:
            self.engine.sync()
            return
        live = dict(self._live.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.policy.model.named_parameters():
                if live[name].requires_grad:
                    parameter.copy_(live[name])

    def generate(self, prompts: list[list[int]], **settings: Any) -> list[Sample]:
        """The engine's."""
        self._check()
        return self.engine.generate(prompts, **settings)

    def remembering(self) -> AbstractContextManager[None]:
        """The engine's."""
        return remembering(self.engine)

    def _check(self) -> None:
        if self.stop.is_set():
            raise Stopped("the training ended while this batch was sampled")
