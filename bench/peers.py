"""Who takes part, and how each is called. A module is imported only when its contender runs.

A contender takes a `Problem` and returns the 0-d loss with its graph. Each is called as its own project would call it, with
the fastest of the settings that keep it what it is; a clipped loss goes on top of log-probs where the project has none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import IGNORED, Case, Problem, Shares, eager_loss

Loss = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Contender:
    """One column of numbers."""

    name: str  # for the command line
    title: str  # for the table
    package: str  # the distribution whose version is reported
    units: Callable[[Case, Shares], float]  # GEMM work in units: 2 are one GEMM over all T rows, 2TVD FLOPs
    load: Callable[[], Loss]  # raises where the package is missing or cannot run
    refuses: Callable[[Case], str | None] = lambda case: None  # why a case is not for it
    once: bool = False  # several times slower than all others by what it is: one run, and no memory


def drift(workspace_bytes: int | None = None, backend: str = "auto") -> Loss:
    """Our own, with the default workspace and backend or others."""
    from drift_kernels import (
        KernelConfig,
        Teacher,
        TeacherTopK,
        distill_loss,
        linear_logprob,
        policy_loss,
        weighted_cross_entropy,
    )

    config = KernelConfig(backend=backend, workspace_bytes=workspace_bytes)

    def loss(p: Problem) -> Tensor:
        if p.case.loss == "score":
            return linear_logprob(p.hidden, p.weight, p.targets, config=config).logprobs
        if p.teacher is not None:
            teacher = (Teacher if p.case.loss == "jsd" else TeacherTopK)(*p.teacher)
            return distill_loss(p.hidden, p.weight, teacher, config=config).loss
        if p.case.loss != "clip":
            return weighted_cross_entropy(p.hidden, p.weight, p.targets, p.token_weights, config=config).loss
        assert p.advantages is not None
        options = {"old_logprobs": p.old, "cu_seqlens": p.cu_seqlens, "config": config}
        return policy_loss(p.hidden, p.weight, p.targets, p.advantages, **options).loss

    return loss


def _eager_rows() -> Loss:
    return lambda p: eager_loss(p, p.trained)


def _torch(options: Callable[[Any], Any]) -> Callable[[], Loss]:
    def load() -> Loss:
        chosen = options(torch.nn.LinearCrossEntropyOptions)

        def loss(p: Problem) -> Tensor:
            reduction = "mean" if p.case.loss == "mean" else "none"
            out = F.linear_cross_entropy(
                p.hidden, p.weight, p.targets, reduction=reduction, ignore_index=IGNORED, options=chosen
            )
            return out if reduction == "mean" else p.loss(-out.float())

        return loss

    return load


def _trl() -> Loss:
    from trl.kernels import ChunkedLogProbFunction

    def loss(p: Problem) -> Tensor:
        out: Any = ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.filled, 1.0, 32_768, None, 1.0, ())
        return p.loss(out[0])

    return loss


def _liger() -> Loss:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction

    return lambda p: p.loss(_ChunkedSelectiveLogProbFunction.apply(p.hidden, p.weight, p.filled, None, 1.0, 4096))


def _liger_grpo(rows: int | None) -> Callable[[], Loss]:
    """In chunks of about `rows` rows; None: of one sequence, its default. Not compiled, which is slower on a CPU."""

    def load() -> Loss:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        def loss(p: Problem) -> Tensor:
            assert p.old is not None
            shape = (p.case.segments, p.case.length)
            chunk: dict[str, Any] = {} if rows is None else {"chunk_size": max(1, rows // p.case.length)}
            fused = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo", **chunk)
            return fused(
                p.hidden.view(*shape, -1),
                p.weight,
                p.filled.view(shape),
                (p.targets != IGNORED).view(shape).float(),
                p.advantages,
                old_per_token_logps=p.old.view(shape),
            )[0]

        return loss

    return load


def _verl() -> Loss:
    # The module alone: importing the package wants ray, tensordict and more, none of which this class uses.
    package = importlib.util.find_spec("verl")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'verl'", name="verl")
    path = Path(package.origin).parent / "utils/experimental/torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fused = module.FusedLinearForPPO(chunk_size=512)
    return lambda p: p.loss(fused(p.hidden, p.weight, p.filled)[0])


def _apple() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(p: Problem) -> Tensor:
        # "mean" where that is the loss, to be fair: the scatter back to [T] is saved.
        reduction = "mean" if p.case.loss == "mean" else "none"
        out = linear_cross_entropy(p.hidden, p.weight, p.targets, reduction=reduction, impl="torch_compile")
        return out if reduction == "mean" else p.loss(-out.float())

    return loss


def _always(units: float) -> Callable[[Case, Shares], float]:
    return lambda case, shares: units


def _chunked_torch(case: Case, shares: Shares) -> float:
    return 6.0 if case.loss == "mean" else 8.0  # unreduced, its backward makes the logits again


def _unmasked(case: Case) -> str | None:
    return "no row is masked: it would be eager" if case.mask == "none" else None


def _unclipped(case: Case) -> str | None:
    return None if case.loss == "clip" else "a policy loss only"


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("drift", "drift", "drift-rl", lambda case, shares: 2 * shares.read + 4 * shares.live, drift),
        Contender("eager", "eager", "torch", lambda case, shares: case.units, lambda: eager_loss),
        Contender(
            "eager-picked",
            "eager, rows picked",
            "torch",
            lambda case, shares: 6 * shares.trained,
            _eager_rows,
            _unmasked,
        ),
        Contender("torch", "torch", "torch", _always(6), _torch(lambda options: None)),
        Contender(
            "torch-512",
            "torch, chunks of 512",
            "torch",
            _chunked_torch,
            _torch(lambda options: options(batch_chunk_size=512, chunking_method=None)),
        ),
        Contender(
            "torch-auto", "torch, default chunks", "torch", _chunked_torch, _torch(lambda options: options()), once=True
        ),
        Contender("trl", "TRL", "trl", _always(8), _trl),
        Contender("liger", "Liger", "liger-kernel", _always(8), _liger),
        Contender("liger-grpo", "Liger GRPO", "liger-kernel", _always(8), _liger_grpo(1024), _unclipped),
        Contender(
            "liger-grpo-default",
            "Liger GRPO, default chunks",
            "liger-kernel",
            _always(8),
            _liger_grpo(None),
            _unclipped,
            once=True,
        ),
        Contender("verl", "verl", "verl", _always(8), _verl),
        Contender("apple", "Apple CCE", "cut-cross-entropy", lambda case, shares: 6 * shares.trained, _apple),
    )
}
