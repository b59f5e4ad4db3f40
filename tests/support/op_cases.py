"""Every op over one batch, by name, so that what holds for all of them is written once. Each reads all it can read: both
heads with bias, LoRA, softcap and a temperature a row; weights some of which are 0; masked targets.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import loose
import torch
from torch import Tensor

import drift_kernels as dk

D, SEEN_D, V, K = 5, 4, 23, 6
LEAVES = ("hidden", "weight", "bias", "A", "B")
ROW_BYTES = 8 * (2 * V + 2 * D + 2 * SEEN_D + 3 * K + 8)  # of a workspace, and some more


@dataclass(frozen=True)
class Batch:
    """S sequences. `tokens` are [T, …], or [S, L, …] once padded; `head` holds what all of them share."""

    lengths: list[int]
    head: dict[str, Tensor]
    tokens: dict[str, Tensor]
    softcap: float | None = 4.0  # of both
    parallel: dk.VocabParallel | dk.GatherHidden | None = None  # likewise

    @property
    def cu(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def ends(self) -> dict[str, Tensor]:
        """What tells an op where sequences end."""
        return {} if self.tokens["targets"].dim() == 2 else {"cu_seqlens": self.cu}

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each packed token in the padded form."""
        row = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.int64))
        return row, torch.arange(len(row)) - self.cu[row]

    def take(self, index: Tensor, lengths: list[int]) -> "Batch":
        return replace(self, lengths=lengths, tokens={name: v[index] for name, v in self.tokens.items()})

    def sequences(self, order: list[int]) -> tuple["Batch", Tensor]:
        """The batch of these sequences, and where their tokens came from."""
        spans = [torch.arange(int(self.cu[i]), int(self.cu[i + 1])) for i in order]
        index = torch.cat([torch.arange(0), *spans])
        return self.take(index, [self.lengths[i] for i in order]), index

    def padded(self) -> "Batch":
        shape = len(self.lengths), max(self.lengths)

        def pad(name: str, v: Tensor) -> Tensor:
            fill = {"targets": -100, "ids": 0, "turn_ids": 0, "has_teacher": True}.get(name, 3.0)
            out = torch.full((*shape, *v.shape[1:]), fill, dtype=v.dtype)
            out[self.places] = v
            return out

        return replace(self, tokens={name: pad(name, v) for name, v in self.tokens.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """`change` on every tensor."""
        return replace(
            self,
            head={name: change(v) for name, v in self.head.items()},
            tokens={name: change(v) for name, v in self.tokens.items()},
        )

    def to(self, dtype: torch.dtype) -> "Batch":
        """Heads and hidden states in `dtype`, what is given per token in the dtype of a loss in it."""
        data = dtype if dtype == torch.float64 else torch.float32

        def cast(name: str, v: Tensor) -> Tensor:
            return v.to(dtype if name in ("hidden", "seen") else data) if v.is_floating_point() else v

        head = {name: v.to(dtype) for name, v in self.head.items()}
        return replace(self, head=head, tokens={name: cast(name, v) for name, v in self.tokens.items()})

    def leaves(self, needs: tuple[str, ...] = LEAVES) -> "Batch":
        """With fresh leaves, of which those named require grad; strides stay as they are."""
        head, tokens = dict(self.head), dict(self.tokens)
        for name in LEAVES:
            group = tokens if name in tokens else head
            group[name] = group[name].detach().requires_grad_(name in needs)
        return replace(self, head=head, tokens=tokens)

    def leaf(self, name: str) -> Tensor:
        return self.tokens[name] if name in self.tokens else self.head[name]

    def with_leaves(self, leaves: tuple[Tensor, ...]) -> "Batch":
        given = dict(zip(LEAVES, leaves))
        return replace(self, tokens=self.tokens | {"hidden": given.pop("hidden")}, head=self.head | given)


def make(lengths: list[int], seed: int) -> Batch:
    g, T = torch.Generator().manual_seed(seed), sum(lengths)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    def some_zero(values: Tensor, share: float = 0.3) -> Tensor:
        return values * (rand(T) > share)

    head = {
        "weight": randn(V, D),
        "bias": 0.3 * randn(V),
        "A": randn(2, D),
        "B": 0.5 * randn(V, 2),
        "teacher_weight": randn(V, SEEN_D),
        "teacher_bias": 0.3 * randn(V),
        "teacher_A": randn(2, SEEN_D),
        "teacher_B": 0.5 * randn(V, 2),
    }
    targets = torch.randint(0, V, (T,), generator=g)
    targets[rand(T) < 0.25] = -100
    tokens = {"hidden": randn(T, D), "seen": randn(T, SEEN_D), "temperature": 0.5 + rand(T)}
    batch = Batch(lengths, head, tokens | {"targets": targets, "teacher_temperature": 0.5 + rand(T)})
    own = loose.linear_logprob(tokens["hidden"], head["weight"], targets, **head_of(batch)).logprobs
    old = own + 0.2 * randn(T)
    kept = dk.topk_logprobs(tokens["seen"], dk.Head(head["teacher_weight"], bias=head["teacher_bias"]), K)
    assert kept.rest is not None
    per_token = {
        "advantages": some_zero(randn(T)),
        "old_logprobs": old,
        "ref_logprobs": own + 0.3 * randn(T),
        "rollout_logprobs": old + 0.1 * randn(T),
        "token_weights": some_zero(rand(T) + 0.1),
        "policy_weights": some_zero(rand(T) + 0.1),
        "rebellious_weights": some_zero(rand(T)),
        "teacher_logprobs": own + 0.5 * randn(T),
        "has_teacher": rand(T) > 0.15,
        "turn_ids": (rand(T) < 0.25).cumsum(0) - 1,
        "ids": kept.ids,
        "kept": kept.logprobs,
        "rest": kept.rest,
    }
    return replace(batch, tokens=batch.tokens | per_token)


def head_of(x: Batch) -> dict:
    lora = dk.LoRAHead(x.head["A"], x.head["B"], 0.5)
    fields = {"bias": x.head["bias"], "lora": lora, "softcap": x.softcap, "parallel": x.parallel}
    return fields | {"temperature": x.tokens["temperature"]}


def data_of(x: Batch, *names: str) -> dict[str, Tensor]:
    return {name: x.tokens[name] for name in names}


def teacher_head(x: Batch) -> dk.Teacher:
    lora = dk.LoRAHead(x.head["teacher_A"], x.head["teacher_B"], 0.7)
    weight, bias = x.head["teacher_weight"], x.head["teacher_bias"]
    return dk.Teacher(
        x.tokens["seen"],
        dk.Head(
            weight,
            bias=bias,
            lora=lora,
            temperature=x.tokens["teacher_temperature"],
            softcap=x.softcap,
            logit_scale=1.1,
            parallel=x.parallel,
        ),
    )


def stored(x: Batch) -> dk.TeacherTopK:
    return dk.TeacherTopK(x.tokens["ids"], x.tokens["kept"], x.tokens["rest"])


def sampled(x: Batch) -> dk.TeacherLogprobs:
    return dk.TeacherLogprobs(x.tokens["teacher_logprobs"])


def focal(logp: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    return -advantages * weights * logp * (1 - logp.exp()) ** 2


POLICY = dk.PolicySpec(kl_coef=0.1, kl_estimator="k3+", entropy_coef=0.05, z_loss_coef=0.01)
GSPO = dk.PolicySpec.preset("gspo", clip_low=0.1, clip_high=0.1, kl_coef=0.1)


def linear_logprob(entropy: bool):
    def run(x, config, normalizer, names):
        hidden, weight, targets = x.tokens["hidden"], x.head["weight"], x.tokens["targets"]
        out = loose.linear_logprob(
            hidden, weight, targets, entropy_gradient=entropy, outputs=names, config=config, **head_of(x)
        )
        weights = x.tokens["token_weights"]
        loss = (out.logprobs * weights).sum()
        if entropy:
            loss = loss + (out.entropy * weights.square()).sum()
        return dk.LossOutput(loss / (1.0 if normalizer is None else normalizer), {"own": out.logprobs} | out.outputs)

    return run


def weighted_cross_entropy(x, config, normalizer, names):
    head, t = x.head, x.tokens
    options = {"normalizer": normalizer, "outputs": names, "config": config, **head_of(x)}
    return loose.weighted_cross_entropy(t["hidden"], head["weight"], t["targets"], t["token_weights"], **options)


def pointwise_loss(x, config, normalizer, names):
    head, t = x.head, x.tokens
    options = {"normalizer": normalizer, "outputs": names, "config": config, **head_of(x)}
    data = (t["advantages"], t["token_weights"])
    return loose.pointwise_loss(t["hidden"], head["weight"], t["targets"], focal, *data, **options)


def policy_loss(spec):
    def run(x, config, normalizer, names):
        t = x.tokens
        data = data_of(x, "old_logprobs", "ref_logprobs", "token_weights") | (x.ends if spec.scope != "token" else {})
        options = {"spec": spec, "normalizer": normalizer, "outputs": names, "config": config, **head_of(x)}
        return loose.policy_loss(t["hidden"], x.head["weight"], t["targets"], t["advantages"], **data, **options)

    return run


def distill_loss(teacher, **spec):
    def run(x, config, normalizer, names):
        data = data_of(x, "token_weights", "targets", "old_logprobs")
        options = {"normalizer": normalizer, "outputs": names, "config": config, **head_of(x)}
        options["spec"] = dk.DistillSpec(**spec)
        return loose.distill_loss(x.tokens["hidden"], x.head["weight"], teacher(x), **data, **options)

    return run


def self_distill_loss(teacher, exploration=None, **spec):
    def run(x, config, normalizer, names):
        t = x.tokens
        data = data_of(x, "policy_weights", "has_teacher", "old_logprobs", "ref_logprobs")
        options = {"normalizer": normalizer, "outputs": names, "config": config, **head_of(x)}
        if exploration is not None:
            data |= data_of(x, "turn_ids", "rebellious_weights") | x.ends
            options |= {"exploration": exploration, "mean_difference": 0.2, "mean_entropy": 2.0}
        return loose.self_distill_loss(
            t["hidden"],
            x.head["weight"],
            t["targets"],
            teacher(x),
            t["advantages"],
            distill_weights=t["token_weights"],
            distill_coef=0.7,
            policy=POLICY,
            distill=dk.DistillSpec(**spec),
            **data,
            **options,
        )

    return run


def topk_logprobs(x, config, normalizer, names):
    """Without a gradient; its sum stands for a loss."""
    kept = loose.topk_logprobs(x.tokens["hidden"], x.head["weight"], K, config=config, **head_of(x))
    where = (x.tokens["targets"] >= 0).to(kept.logprobs.dtype) * x.tokens["token_weights"].to(kept.logprobs.dtype)
    total = (kept.logprobs.sum(-1) * where + kept.rest * where).sum() / (1.0 if normalizer is None else normalizer)
    real = x.tokens["targets"] >= 0
    own = {"ids": kept.ids * real[..., None], "kept": kept.logprobs * real[..., None], "rest": kept.rest * real}
    return dk.LossOutput(total, own)


@dataclass(frozen=True)
class Op:
    call: Callable  # (batch, config, normalizer, names of outputs) → LossOutput
    outputs: tuple[str, ...] = ()
    gradient: bool = True
    alone: bool = True  # whether a token's loss reads that token alone


ROWS = ("logprobs", "entropy", "lse", "is_top1", "mean_logits", "log_sum_sq_probs")
DISTILLED = ("logprobs", "entropy", "divergence")
EXPLORED = ("ratio", "clipped", "divergence", "difference", "rhythm", "gate", "rebellious")
OPS = {
    "linear_logprob": Op(linear_logprob(False), ROWS),
    "linear_logprob_entropy": Op(linear_logprob(True), ROWS),
    "weighted_cross_entropy": Op(weighted_cross_entropy, ROWS),
    "pointwise_loss": Op(pointwise_loss, ROWS),
    "policy_loss": Op(policy_loss(POLICY), ("logprobs", "ratio", "kl", "clipped")),
    "policy_loss_gspo": Op(policy_loss(GSPO), ("logprobs", "ratio", "kl", "clipped"), alone=False),
    "distill_loss": Op(distill_loss(teacher_head, alpha=0.3, importance_clip=2.0), (*DISTILLED, "teacher_entropy")),
    "distill_loss_forward": Op(distill_loss(teacher_head, alpha=0.0), DISTILLED),
    "distill_loss_reverse": Op(distill_loss(teacher_head, alpha=1.0), DISTILLED),
    "distill_loss_top_k": Op(distill_loss(teacher_head, alpha=0.3, top_k=K), (*DISTILLED, "teacher_logprobs")),
    "distill_loss_stored": Op(distill_loss(stored, alpha=0.3, tail=False), DISTILLED),
    "distill_loss_sampled": Op(distill_loss(sampled, alpha=1.0), DISTILLED),
    "self_distill_loss": Op(self_distill_loss(teacher_head, alpha=0.4), ("ratio", *DISTILLED)),
    "self_distill_loss_stored": Op(self_distill_loss(stored, alpha=0.4), ("ratio", *DISTILLED)),
    "self_distill_loss_explored": Op(
        self_distill_loss(teacher_head, dk.ExplorationSpec(entropy_warmup=True), alpha=0.4), EXPLORED, alone=False
    ),
    "topk_logprobs": Op(topk_logprobs, gradient=False),
}
LOSSES = [name for name, op in OPS.items() if op.gradient]


@dataclass
class Result:
    """Of one call; all without gradient."""

    loss: Tensor
    tokens: dict[str, Tensor] = field(default_factory=dict)  # gradient of hidden, and outputs
    head: dict[str, Tensor] = field(default_factory=dict)  # gradients of all other leaves
    metrics: dict[str, Tensor] = field(default_factory=dict)  # [sum, count]

    def at(self, index) -> "Result":
        return replace(self, tokens={name: v[index] for name, v in self.tokens.items()})


def run(
    name: str,
    batch: Batch,
    normalizer: float | None = 7.0,
    needs: tuple[str, ...] = LEAVES,
    outputs: bool = False,
    config: dk.KernelConfig = dk.KernelConfig(),
    around: AbstractContextManager | None = None,
) -> Result:
    """Loss, gradients of the leaves in `needs`, metrics, and with `outputs` all the op has per token. `around` the forward."""
    op, x = OPS[name], batch.leaves(needs)
    with around or nullcontext():
        out = op.call(x, config, normalizer, op.outputs if outputs else ())
    needs = needs if op.gradient else ()
    grads = dict(zip(needs, torch.autograd.grad(out.loss, [x.leaf(n) for n in needs]))) if needs else {}
    tokens = {f"of {n}": v.detach() for n, v in out.outputs.items()}
    if "hidden" in grads:
        tokens["hidden"] = grads.pop("hidden")
    metrics = {n: torch.stack([t.double() for t in pair]) for n, pair in out.metrics.items()}
    return Result(out.loss.detach(), tokens, grads, metrics)


def joined(parts: list[Result]) -> Result:
    """What calls over consecutive parts of a batch make of it together."""
    first = parts[0]
    return Result(
        torch.stack([part.loss for part in parts]).sum(),
        {name: torch.cat([part.tokens[name] for part in parts]) for name in first.tokens},
        {name: torch.stack([part.head[name] for part in parts]).sum(0) for name in first.head},
        {name: torch.stack([part.metrics[name] for part in parts]).sum(0) for name in first.metrics},
    )


def close(a: Result, b: Result, metrics: bool = True, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    for mine, yours in ((a.loss, b.loss), (a.tokens, b.tokens), (a.head, b.head)):
        torch.testing.assert_close(mine, yours, rtol=rtol, atol=atol)
    if metrics:
        torch.testing.assert_close(a.metrics, b.metrics, rtol=rtol, atol=atol)
