"""Who takes part on a GPU, and how each is called; what `bench.peers` has is taken from there.

Each is called as its own project would. Those of verl and unsloth are files of packages whose import asks for, or changes,
much else: the packages' own `__init__` is passed over.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from bench.cases import IGNORED, TAUGHT, Case, Problem, Shares
from bench.peers import CONTENDERS, Contender, Loss, drift

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "unsloth_zoo")


def bare(package: str, *inner: str) -> None:
    """Lets files of `package` be imported without running the `__init__` of it and of its `inner` packages."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    root = Path(spec.origin).parent
    for name in ("", *inner):
        whole = f"{package}.{name}".rstrip(".")
        module = ModuleType(whole)
        module.__path__ = [str(root / name.replace(".", "/"))]
        module.__spec__ = importlib.machinery.ModuleSpec(whole, None, origin=spec.origin, is_package=True)
        sys.modules.setdefault(whole, module)


def _liger(sums: torch.dtype | None) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(p: Problem) -> Any:
        reduction = "mean" if p.case.loss == "mean" else "none"
        out: Any = liger_fused_linear_cross_entropy(
            p.hidden, p.weight, p.targets, ignore_index=IGNORED, reduction=reduction, accum_dtype=sums
        )
        return out if reduction == "mean" else p.loss(-out.float())

    return loss


def _liger_triton_grpo() -> Loss:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(p: Problem) -> Any:
        shape = (p.case.segments, p.case.length)
        hidden = F.pad(p.hidden.view(*shape, -1), (0, 0, 0, 1))  # it wants one row more, which it leaves out
        return triton_grpo_loss(
            hidden @ p.weight.t(),
            None if p.old is None else p.old.view(shape),
            None,
            p.filled.view(shape),
            p.advantages,
            completion_mask=(p.targets != IGNORED).view(shape).float(),
            temperature=1.0,
            beta=0.0,
            eps_low=0.2,
            eps_high=0.2,
            loss_type="bnpo",
            reduce=True,
        )[0]

    return loss


def _liger_jsd(sums: torch.dtype | None) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return lambda p: liger_fused_linear_jsd(p.hidden, p.weight, *_teacher(p), jsd_beta=0.5, accum_dtype=sums)


def _liger_jsd_torch() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(p: Problem) -> Any:
        fused = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.5, compiled=p.hidden.is_cuda)  # no cross-entropy beside it
        return fused(p.hidden, p.weight, *_teacher(p), p.targets)

    return loss


def _teacher(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    assert p.teacher is not None
    return p.teacher


def _apple() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(p: Problem) -> Any:
        reduction = "mean" if p.case.loss == "mean" else "none"
        out = linear_cross_entropy(p.hidden, p.weight, p.targets, reduction=reduction, impl="cce")
        return out if reduction == "mean" else p.loss(-out.float())

    return loss


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda p: chunked_linear_cross_entropy(p.hidden, p.weight, p.targets, ignore_index=IGNORED)


def _quack_whole() -> Loss:
    from quack.linear_cross_entropy import linear_cross_entropy_func

    def loss(p: Problem) -> Any:
        options: Any = {"ignore_index": IGNORED, "reduction": "none", "inplace_backward": True}
        return p.loss(-linear_cross_entropy_func(p.hidden, p.weight, None, p.targets, **options).float())

    return loss


def _verl() -> Loss:
    bare("verl", "utils", "utils.kernel")
    fused = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda p: p.loss(fused(p.hidden, p.weight, p.filled, 1.0, "none")[0])


def _unsloth() -> Loss:
    bare("unsloth_zoo", "fused_losses", "temporary_patches")
    fused = importlib.import_module("unsloth_zoo.fused_losses.fused_linear").fused_linear_cross_entropy

    def loss(p: Problem) -> Any:
        return fused(p.hidden, p.weight, None, p.targets, divisor=(p.targets != IGNORED).sum(), ignore_index=IGNORED)

    return loss


def _all(units: float) -> Callable[[Case, Shares], float]:
    return lambda case, shares: units


def _ours(case: Case, shares: Shares) -> float:
    return case.units * shares.read  # clipped rows stay in


def _mean_only(case: Case) -> str | None:
    return None if case.loss == "mean" else "a mean cross-entropy only"


def _whole_head(case: Case) -> str | None:
    return None if case.loss == "jsd" else "a teacher's head over the whole vocabulary only, no top k"


def contenders(roles: dict[str, str], case: Case | None = None) -> list[Contender]:
    """Ours, by the backends that run in the places of `roles`, and everyone else's; of all, those with a loss of the case's
    kind, from a teacher or from targets."""
    known = CONTENDERS
    both = [
        Contender(f"drift-{role}", f"drift, {role}", "drift-rl", _ours, partial(drift, None, backend))
        for role, backend in roles.items()
    ]
    both += [known["eager"]]
    taught = [
        Contender("liger-jsd", "Liger JSD", "liger-kernel", _all(8), partial(_liger_jsd, None), _whole_head),
        Contender(
            "liger-jsd-fp32",
            "Liger JSD, fp32 sums",
            "liger-kernel",
            _all(8),
            partial(_liger_jsd, torch.float32),
            _whole_head,
        ),
        Contender("liger-jsd-torch", "Liger JSD, torch", "liger-kernel", _all(8), _liger_jsd_torch, _whole_head),
    ]
    theirs = [
        Contender("liger-ce", "Liger CE", "liger-kernel", _all(6), partial(_liger, None)),
        Contender("liger-ce-fp32", "Liger CE, fp32 sums", "liger-kernel", _all(6), partial(_liger, torch.float32)),
        Contender("apple-cce", "Apple CCE", "cut-cross-entropy", lambda c, s: 8 * s.trained, _apple),
        Contender("quack", "quack", "quack-kernels", _all(6), _quack, _mean_only),
        Contender("quack-logits", "quack, all logits", "quack-kernels", _all(6), _quack_whole),
        Contender("verl-triton", "verl, Triton", "verl", _all(8), _verl),
        Contender("unsloth", "unsloth", "unsloth_zoo", lambda c, s: 6 * s.trained, _unsloth, _mean_only),
        Contender(
            "liger-grpo-triton",
            "Liger GRPO, Triton",
            "liger-kernel",
            _all(6),
            _liger_triton_grpo,
            known["liger-grpo"].refuses,
        ),
    ]
    shared = ("eager-picked", "torch", "torch-512", "torch-auto", "trl", "liger", "liger-grpo", "verl")
    targets = [*(known[name] for name in shared), *theirs]
    if case is None:
        return [*both, *targets, *taught]
    return [*both, *(taught if case.loss in TAUGHT else targets)]
