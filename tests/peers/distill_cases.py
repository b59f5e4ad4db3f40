"""A batch with a teacher, and what `distill_loss` and a peer make of the two distributions of each token.

A peer is a function of both logits [B, L, V] and the batch, from plain torch as in `peer_cases`, so that its own gradients
reach the student's hidden states and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import loose
import torch
from hypothesis import strategies as st
from peer_cases import Batch, D, Result, V, assert_agree, batches, gradients, make_batch
from torch import Tensor

import drift_kernels as dk
from drift_kernels.teachers import AnyTeacher

WIDTH = D - 1  # the teacher's own


@dataclass
class Lesson:
    """`hidden` [B, L, WIDTH] and `weight` [V, WIDTH] are the teacher's: float64 values that fp32 holds exactly."""

    batch: Batch
    hidden: Tensor
    weight: Tensor

    def logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.hidden.to(dtype) @ self.weight.to(dtype).T

    def head(self, dtype: torch.dtype, **options) -> dk.Teacher:
        return dk.Teacher(self.hidden.to(dtype), dk.Head(self.weight.to(dtype), **options))

    def top(self, dtype: torch.dtype, k: int) -> dk.TeacherTopK:
        """Its k likeliest tokens, as a server would send them."""
        found = self.logits(dtype).log_softmax(-1).topk(k, -1)
        return dk.TeacherTopK(found.indices, found.values)

    def sampled(self, dtype: torch.dtype) -> Tensor:
        """Its log-probs of the targets [B, L]."""
        return self.logits(dtype).log_softmax(-1).gather(-1, self.batch.targets[..., None]).squeeze(-1)


def taught(batch: Batch, seed: int = 0) -> Lesson:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*batch.mask.shape, WIDTH, generator=g)
    return Lesson(batch, hidden.double(), torch.randn(V, WIDTH, generator=g).double())


@st.composite
def lessons(draw: st.DrawFn) -> Lesson:
    return taught(draw(batches()), draw(st.integers(0, 10**6)))


def make_lesson(seed: int, B: int = 4, L: int = 7) -> Lesson:
    return taught(make_batch(seed, B, L, True), seed)


def ours(
    lesson: Lesson, teacher: Callable[[torch.dtype], AnyTeacher], spec: dk.DistillSpec, dtype: torch.dtype, **given
) -> Result:
    """`distill_loss` by the real driver, of the tokens that are trained."""
    x = lesson.batch.to(dtype)
    targets = torch.where(x.mask, x.targets, -100)
    config = dk.KernelConfig(backend="cpu", workspace_bytes=x.workspace)
    if given.pop("old", False):
        given["old_logprobs"] = x.old
    out = loose.distill_loss(x.hidden, x.weight, teacher(dtype), targets=targets, spec=spec, config=config, **given)
    return gradients(out.loss, x)


def theirs(lesson: Lesson, peer: Callable[[Tensor, Tensor, Batch], Tensor], dtype: torch.dtype) -> Result:
    x = lesson.batch.to(dtype)
    return gradients(peer(x.hidden @ x.weight.T, lesson.logits(dtype), x), x)


def assert_same_divergence(
    lesson: Lesson,
    peer: Callable[[Tensor, Tensor, Batch], Tensor],
    teacher: Callable[[torch.dtype], AnyTeacher],
    spec: dk.DistillSpec,
    rtol: float = 1e-9,
    **given,
) -> None:
    """Ours is the peer's: value and gradients, fp64 and fp32."""
    double, single = (ours(lesson, teacher, spec, dtype, **given) for dtype in (torch.float64, torch.float32))
    exact, own = (theirs(lesson, peer, dtype) for dtype in (torch.float64, torch.float32))
    logits = max(float((lesson.batch.hidden @ lesson.batch.weight.T).abs().max()), float(lesson.logits().abs().max()))
    assert_agree(double, single, exact, own, logits / given.get("temperature", 1.0), rtol)
