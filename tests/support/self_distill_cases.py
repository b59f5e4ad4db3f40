"""One packed batch of turns with a policy loss and a teacher, and both losses over it."""

import loose
import torch
import torch.nn.functional as F

import drift_kernels as dk
from drift_kernels.testing import gradients, make_case, off_the_edges

BACKENDS = ["cpu", "reference"]
T, D, V = 40, 9, 61
CASE = make_case(T, D, V, seed=2, masked=0.0)
RANDOM = torch.Generator().manual_seed(7)
TURNS = torch.repeat_interleave(torch.tensor([-1, 0, -1, 1, 2, -1, 0, 1]), torch.tensor([3, 8, 2, 7, 1, 4, 9, 6]))
CU = torch.tensor([0, 21, 40], dtype=torch.int32)  # the second sequence begins with a row outside any turn
TARGETS = CASE.targets.masked_fill(TURNS < 0, -100)
MASK = TARGETS >= 0
SEEN = torch.randn(T, 5, generator=RANDOM, dtype=torch.float64)
TEACHER_WEIGHT = torch.randn(V, 5, generator=RANDOM, dtype=torch.float64) * 0.5
TEACHER = dk.Teacher(SEEN, dk.Head(TEACHER_WEIGHT, temperature=1.2))
HAS_TEACHER = torch.arange(T) < 34
LOG_T = (F.linear(SEEN, TEACHER_WEIGHT) / 1.2).log_softmax(-1)
POLICY_WEIGHTS = CASE.token_weights
DISTILL_WEIGHTS = torch.rand(T, generator=RANDOM, dtype=torch.float64) * (torch.rand(T, generator=RANDOM) > 0.4)
REBELLIOUS = torch.rand(T, generator=RANDOM, dtype=torch.float64) * (torch.rand(T, generator=RANDOM) > 0.3)
HEAD = {"temperature": 0.7, "softcap": 4.0}
LOG_S = (4.0 * torch.tanh(F.linear(CASE.hidden, CASE.weight, CASE.bias) / 4.0) / 0.7).log_softmax(-1)
LOGP = LOG_S.gather(-1, TARGETS.clamp(min=0)[:, None])[:, 0]
OLD = off_the_edges(LOGP + CASE.noise, LOGP, (0.8, 1.2, 2.0))
MANY = dk.KernelConfig(workspace_bytes=8 * (2 * V + 2 * D + 5) * 7)  # several chunks in double


def hybrid(h, w, b, teacher=TEACHER, full=False, **options):
    options = {
        "distill_weights": DISTILL_WEIGHTS,
        "policy_weights": POLICY_WEIGHTS,
        "old_logprobs": OLD,
        "bias": b,
        "config": MANY,
        **HEAD,
        **options,
    }
    out = loose.self_distill_loss(h, w, TARGETS, teacher, CASE.advantages, **options)
    return out if full else out.loss


def same(actual, exact, rtol=1e-9, atol=1e-12):
    actual, exact = (gradients(f, CASE.leaves(torch.float64)) for f in (actual, exact))
    torch.testing.assert_close(actual, exact, rtol=rtol, atol=atol)


POLICIES = {
    "ppo": dk.PolicySpec(),
    "dapo": dk.PolicySpec.preset("dapo", dual_clip=3.0),
    "cispo": dk.PolicySpec.preset("cispo"),
    "sapo": dk.PolicySpec.preset("sapo", aggregation="token_mean"),
    "dppo": dk.PolicySpec.preset("dppo_tv"),
    "reinforce": dk.PolicySpec(objective="reinforce"),
    "everything": dk.PolicySpec(kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.05, z_loss_coef=0.01),
    "corrected": dk.PolicySpec(correction="sequence_truncate", correction_bounds=(0.0, 1.2)),
    "sums": dk.PolicySpec(aggregation="token_sum"),
}
TEACHERS = {
    "forward": (TEACHER, dk.DistillSpec(0.0)),
    "mixed": (TEACHER, dk.DistillSpec(0.4, importance_clip=2.0)),
    "reverse": (TEACHER, dk.DistillSpec(1.0)),
    "top_k": (TEACHER, dk.DistillSpec(0.4, 5, importance_clip=2.0)),
    "stored": (dk.topk_logprobs(SEEN, TEACHER_WEIGHT, 6), dk.DistillSpec(0.4, tail=False)),
    "sampled": (dk.TeacherLogprobs(LOG_T.gather(-1, TARGETS.clamp(min=0)[:, None])[:, 0]), dk.DistillSpec(1.0)),
}
