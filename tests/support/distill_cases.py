"""A small student and teacher, every kind of teacher beside it, and divergences written out over full logits."""

import loose
import torch
import torch.nn.functional as F

import drift_kernels as dk
from drift_kernels.testing import gradients, make_case

ALPHAS = [0.0, 0.1, 0.5, 0.9, 1.0]
BACKENDS = ["cpu", "reference"]
CASE = make_case(30, 9, 61, seed=1)
WEIGHTS = CASE.token_weights
OLD = torch.full((30,), -4.1, dtype=torch.float64)
MANY = dk.KernelConfig(workspace_bytes=8 * (2 * 61 + 9 + 9 + 5) * 7)  # at least three chunks in double
RANDOM = torch.Generator().manual_seed(5)
TEACHER_HIDDEN = torch.randn(30, 5, generator=RANDOM, dtype=torch.float64)
TEACHER_WEIGHT = torch.randn(61, 5, generator=RANDOM, dtype=torch.float64)
TEACHER_BIAS = torch.randn(61, generator=RANDOM, dtype=torch.float64)
TEACHER = dk.Teacher(
    TEACHER_HIDDEN, dk.Head(TEACHER_WEIGHT, bias=TEACHER_BIAS, temperature=1.3, softcap=6.0, logit_scale=0.8)
)
HEAD = {"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.2}


def logits_of(hidden, weight, bias, temperature=1.0, softcap=None, logit_scale=1.0):
    z = F.linear(hidden, weight, bias)
    z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
    return (softcap * torch.tanh(z / softcap) if softcap else z) / temperature


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(log_s, log_t, alpha):
    """As the method writes it."""
    if alpha == 0:
        return kl(log_t, log_s)
    if alpha == 1:
        return kl(log_s, log_t)
    log_m = ((1 - alpha) * log_s.exp() + alpha * log_t.exp()).log()
    return (1 - alpha) * kl(log_s, log_m) + alpha * kl(log_t, log_m)


def over_top_k(log_s, log_t, ids, tail, alpha):
    """Over tokens `ids` [T, k] and, with `tail`, the rest as one; `log_t` over the vocabulary, or [T, k] of the ids."""
    s, t = log_s.exp().gather(-1, ids), (log_t if log_t.shape == ids.shape else log_t.gather(-1, ids)).exp()
    if tail:
        s, t = (torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1) for p in (s, t))
    else:
        s, t = (p / p.sum(-1, keepdim=True) for p in (s, t))
    return jsd(s.log(), t.log(), alpha)


def teacher_log_probs():
    return logits_of(TEACHER_HIDDEN, TEACHER_WEIGHT, TEACHER_BIAS, 1.3, 6.0, 0.8).log_softmax(-1)


def stored(k=7):
    return dk.topk_logprobs(
        TEACHER_HIDDEN, dk.Head(TEACHER_WEIGHT, bias=TEACHER_BIAS, temperature=1.3, softcap=6.0, logit_scale=0.8), k
    )


def loss_of(teacher, spec, config=MANY, **options):
    def run(h, w, b):
        return loose.distill_loss(
            h, dk.Head(w, bias=b), teacher, WEIGHTS, targets=CASE.targets, spec=spec, config=config, **HEAD, **options
        ).loss

    return run


def same(actual, exact, rtol=1e-9, atol=1e-12):
    actual, exact = (gradients(f, CASE.leaves(torch.float64)) for f in (actual, exact))
    torch.testing.assert_close(actual, exact, rtol=rtol, atol=atol)


MODES = {
    "full": (TEACHER, dk.DistillSpec(0.3)),
    "forward": (TEACHER, dk.DistillSpec(0.0)),
    "reverse": (TEACHER, dk.DistillSpec(1.0)),
    "top_k": (TEACHER, dk.DistillSpec(0.3, 5)),
    "stored": (stored(), dk.DistillSpec(0.3, tail=False)),
    "sampled": (dk.TeacherLogprobs(OLD), dk.DistillSpec(1.0)),
}


def rows_of(teacher, index):
    if isinstance(teacher, dk.Teacher):
        return dk.Teacher(teacher.hidden[index], teacher.head)
    if isinstance(teacher, dk.TeacherTopK):
        return dk.TeacherTopK(teacher.ids[index], teacher.logprobs[index], teacher.rest[index])
    return dk.TeacherLogprobs(teacher.logprobs[index])
