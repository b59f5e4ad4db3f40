"""What vLLM's workers learn from drift: `--worker-extension-cls drift.engines.vllm_worker.Weights`.

It runs in the server's process and environment, where this package has to be importable (PYTHONPATH is enough) and none
of its dependencies. vLLM's own `reload_weights` leaves on a CPU a tied `lm_head` with the weights that it started
with, without a word; and a server that was started anew does not say so.
"""

from __future__ import annotations

import uuid
from typing import Any

START = uuid.uuid4().hex[:16]  # of this process: another one after a restart


class Weights:
    """Mixed into the worker class; each method is called by name through `/collective_rpc`."""

    drift_version: str | None = None  # which of the trainer's weights it holds; None are those it was started with

    def drift_state(self) -> dict[str, Any]:
        """Who this is, and what it holds."""
        config: Any = self.vllm_config.model_config  # pyright: ignore[reportAttributeAccessIssue]
        return {"start": START, "version": self.drift_version, "vocabulary": config.get_vocab_size()}

    def drift_load(self, folder: str, version: str) -> None:
        """Takes up the weights in a folder, as `save_pretrained` left them; `drift_mark` says when they may be used.

        A worker that holds this version already keeps its name: another rank may be sampling from it.
        """
        worker: Any = self
        kept = version if self.drift_version == version else None
        self.drift_version = None  # should it fail half-way
        worker.reload_weights(weights_path=folder)
        head = getattr(worker.model_runner.get_model(), "lm_head", None)
        method = getattr(head, "quant_method", None)
        if method is not None:  # a CPU multiplies by a copy of the head, which a reload of tied weights does not renew
            method.process_weights_after_loading(head)
        self.drift_version = kept

    def drift_mark(self, version: str) -> None:
        """Notes the version of weights or adapters that were loaded, once no prefix of older ones is left."""
        self.drift_version = version
