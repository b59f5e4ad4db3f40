"""Both branches of an online step on one batch: the policy loss and the divergence from the teacher (B6, B7).

A student's pack goes through the model once. The same trajectories under the teacher's prompts went through it before,
with the teacher's weights in place and without gradient; their hidden states are laid beside the student's rows, token
by token, and `drift_kernels.self_distill_loss` makes both losses of the two logits in one pass. The log-probs that
ratios start from are the policy's own, of the same hidden states: so ratios are 1, and what differs from the sampler's
log-probs is corrected for, up to a factor of 2 a token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import drift_kernels
from drift.config import Config
from drift.config.algorithms import Algorithm
from drift.model.policy import Policy
from drift.online import examples
from drift.online.curriculum import Phase
from drift.online.teacher import Teacher
from drift.packing import pack
from drift.rhythm import StepMean
from drift.training.optimizer import MasterAdamW
from drift.training.reference import scoring
from drift.training.trainer import logit_transform
from drift.types import PackedBatch, Trajectory

SEEN = ("teacher_logprobs", "teacher_entropy", "divergence", "rhythm", "gate", "rebellious")  # the latter by the rhythm
CORRECTION = {"correction": "token_truncate", "correction_bounds": (0.0, 2.0)}  # of sampler against trainer (B7)


@dataclass(slots=True)
class Sample:
    """One trajectory of a rollout batch on its way to the loss."""

    trajectory: Trajectory  # `index` is its place in the global batch
    messages: list[dict[str, str]]
    solved_at: int  # turn of the right answer, 0 for none
    reward: float
    answers: list[str]  # normalised, those that could be parsed
    unparsed: int
    feedback: str | None = None  # what its last wrong answer but the final one was told
    taught: Trajectory | None = None  # the same responses under the teacher's prompt
    distill: float = 0.0  # weights by the router
    policy: float = 0.0
    rebellious: float = 0.0
    pass_rate: float = 0.0  # of its problem, as the router believed it
    row: dict[str, Any] = field(default_factory=dict)  # as it was sampled, in the names of `drift.store`
    earlier: list[Sample] = field(default_factory=list)  # with history: template, its turns before the last one

    @property
    def parts(self) -> list[Sample]:
        """Every token sequence of the trajectory: itself, after those of earlier turns."""
        return [*self.earlier, self]

    @property
    def problem_id(self) -> str:
        """Whose group it belongs to."""
        return self.trajectory.problem_id

    @property
    def text(self) -> str:
        """The final turn's."""
        return self.messages[-1]["content"]


@dataclass(slots=True)
class Measured:
    """This rank's part of a step."""

    loss: float = 0.0
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)  # name → (sum, count), of tokens
    examples: list[dict[str, Any]] = field(default_factory=list)  # rows of `drift.online.examples`
    logprobs: dict[int, Tensor] = field(default_factory=dict)  # of the samples that were asked for, by place

    def add(self, **values: tuple[Any, Any]) -> None:
        """Adds (sum, count) pairs."""
        for name, (total, count) in values.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + float(total), before[1] + float(count))


class Branches:
    """`accumulate` adds a batch's gradients to the optimizer's. The two means are those of the step before."""

    def __init__(
        self,
        policy: Policy,
        optimizer: MasterAdamW,
        config: Config,
        algorithm: Algorithm,
        difference: StepMean,
        entropy: StepMean,
    ) -> None:
        if config.online is None or algorithm.policy is None:
            raise ValueError("config.online is missing, or the algorithm has no policy loss")
        self.policy, self.optimizer, self.train, self.online = policy, optimizer, config.train, config.online
        self.algorithm, self.difference, self.entropy = algorithm, difference, entropy
        self.spec = drift_kernels.PolicySpec.preset(algorithm.policy, **CORRECTION)
        softcap, logit_scale = logit_transform(policy.model.config)
        self.logits: dict[str, Any] = {
            "temperature": config.rollout.temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
        }
        self.kernel = drift_kernels.KernelConfig(
            backend=config.train.backend, workspace_bytes=config.train.workspace_bytes
        )

    def accumulate(
        self,
        samples: Sequence[Sample],
        phase: Phase,
        teacher: Teacher | None,
        tokens: int,
        trajectories: int,
        keep: Collection[int] = (),
        score: Collection[int] = (),
    ) -> Measured:
        """This rank's samples; tokens, trajectories: of the global batch, all ranks' response tokens and samples.

        keep: places in the global batch of the samples whose tokens go into `Measured.examples`; score: of those whose
        log-probs under the policy, before the update, go into `Measured.logprobs`.
        """
        by_index = {sample.trajectory.index: sample for sample in samples}
        students = [sample.trajectory for sample in samples]
        packs = pack(students, self.train.max_tokens, max_length=self.train.longest, turns="assistant")
        sides = [[by_index[index] for index in batch.indices] for batch in packs]
        device, measured = self.policy.device, Measured()
        heads = self._teach(sides, packs, teacher) if teacher else [None] * len(packs)
        normalizer = trajectories if self.spec.aggregation.startswith("sequence") else tokens
        for batch, side, head in zip(packs, sides, heads):
            logprobs = self._pack(batch.to(device), side, head, phase, normalizer, measured, keep)
            bounds = batch.cu_seqlens.tolist()
            for index, start, stop in zip(batch.indices, bounds, bounds[1:]):
                if index in score:
                    found = logprobs[start:stop][batch.response_mask[start:stop].to(device)]
                    measured.logprobs[index] = found.float().cpu()
        return measured

    def _teach(
        self, sides: Sequence[Sequence[Sample]], packs: Sequence[PackedBatch], teacher: Teacher
    ) -> list[drift_kernels.TeacherHead | None]:
        """The teacher of each pack, its hidden states at the student's rows; None where no sample has one."""
        found: list[drift_kernels.TeacherHead | None] = []
        with teacher.weights(), scoring(self.policy.model):
            weight, bias = (None if t is None else t.detach().clone() for t in self.policy.head())
            for side, batch in zip(sides, packs):
                taught = [sample.taught for sample in side if sample.taught is not None]
                if not taught or weight is None:
                    found.append(None)
                    continue
                [longer] = pack(taught, sum(len(t.token_ids) for t in taught), turns="assistant")
                longer = longer.to(weight.device)
                hidden = self.policy.hidden(longer)
                rows = _spread(batch, [sample.taught is not None for sample in side]).to(weight.device)
                beside = hidden.new_zeros(len(batch.targets), hidden.shape[1])
                beside[rows] = hidden[longer.response_mask]
                found.append(drift_kernels.TeacherHead(beside, weight, bias, **self.logits))
        return found

    def _pack(
        self,
        batch: PackedBatch,
        side: Sequence[Sample],
        teacher: drift_kernels.TeacherHead | None,
        phase: Phase,
        normalizer: float,
        measured: Measured,
        keep: Collection[int],
    ) -> Tensor:
        """The policy's log-probs [T]."""
        hidden, (weight, bias) = self.policy.hidden(batch), self.policy.head()
        common: dict[str, Any] = {**self.logits, "bias": bias, "config": self.kernel}
        with torch.no_grad():
            scored = drift_kernels.linear_logprob(hidden, weight, batch.targets, return_entropy=True, **common)
        assert scored.entropy is not None
        assert batch.advantages is not None
        policy = _spread(batch, [sample.policy * phase.policy for sample in side])
        common |= {
            "old_logprobs": scored.logprobs,
            "rollout_logprobs": batch.rollout_logprobs,
            "normalizer": normalizer,
        }
        if teacher is None:
            out = drift_kernels.policy_loss(
                hidden,
                weight,
                batch.targets,
                batch.advantages,
                token_weights=policy,
                cu_seqlens=batch.cu_seqlens,
                spec=self.spec,
                **common,
            )
        else:
            has_teacher = _spread(batch, [sample.taught is not None for sample in side])
            out = drift_kernels.self_distill_loss(
                hidden,
                weight,
                batch.targets,
                teacher,
                batch.advantages,
                distill_weights=self._sampled_by(batch, scored.logprobs)
                * _spread(batch, [sample.distill * phase.distill for sample in side]),
                policy_weights=policy,
                distill_coef=self.online.distill.weight,
                has_teacher=has_teacher,
                policy=self.spec,
                distill=self._divergence(),
                outputs=SEEN if self.algorithm.rhythm else SEEN[:3],
                **self._exploration(batch, side, phase),
                **common,
            )
            self._measure_teacher(out, scored, has_teacher, measured)
        out.loss.backward()
        self.optimizer.collect()
        measured.loss += float(out.loss.detach())
        values = {"logprobs": scored.logprobs, "entropy": scored.entropy, **out.outputs}
        for segment, sample in enumerate(side):
            if sample.trajectory.index in keep:
                measured.examples.append(self._example(batch, segment, sample, values, phase))
        mask, count = batch.response_mask, batch.response_mask.sum()
        measured.add(entropy=(scored.entropy[mask].sum(), count))
        if batch.rollout_logprobs is not None:
            measured.add(sampler_kl=((batch.rollout_logprobs - scored.logprobs)[mask].sum(), count))
        measured.add(**{name.replace("/", "_"): pair for name, pair in out.metrics.items() if name != "taught_entropy"})
        return scored.logprobs

    def _sampled_by(self, batch: PackedBatch, logprobs: Tensor) -> Tensor | float:
        """The divergence's importance ratio where the sampler's weights are older, one step or more (B6)."""
        clip = self.online.distill.importance_clip
        if not self.online.ahead or clip is None or batch.rollout_logprobs is None:
            return 1.0
        return (logprobs - batch.rollout_logprobs).clamp(-20, 20).exp().clamp(max=clip)

    def _example(
        self, batch: PackedBatch, segment: int, sample: Sample, values: dict[str, Tensor], phase: Phase
    ) -> dict[str, Any]:
        """What of a sample is worth a look (see `drift.online.examples`); without a teacher, what is the student's."""
        shown = {
            "bonus" if name == "rebellious" else name: value
            for name, value in values.items()
            if sample.taught is not None or name not in SEEN
        }
        return {
            "prompt_id": sample.problem_id,
            "index": sample.trajectory.index,
            "solved_at": sample.solved_at,
            "reward": sample.reward,
            "advantage": sample.trajectory.advantage,
            "phase": phase.name,
            "policy_factor": phase.policy,
            "policy_weight": sample.policy,
            "distill_weight": sample.distill,
            "rebellious_weight": sample.rebellious,
            **examples.tokens_of(batch, segment, shown, self.policy.tokenizer),
        }

    def _divergence(self) -> drift_kernels.DistillSpec:
        settings = self.online.distill
        return drift_kernels.DistillSpec(
            alpha=settings.alpha, top_k=settings.top_k, importance_clip=settings.importance_clip
        )

    def _exploration(self, batch: PackedBatch, side: Sequence[Sample], phase: Phase) -> dict[str, Any]:
        if not self.algorithm.rhythm:
            return {}
        settings = self.online.rhythm
        spec = drift_kernels.ExplorationSpec(
            rhythm_maximum=settings.maximum,
            weigh_divergence=settings.weigh_divergence,
            gate=settings.gate,
            gate_floor=settings.floor,
            gate_power=settings.power,
            margin=settings.margin,
            gamma=settings.bonus_gamma,
            bonus_maximum=settings.bonus_maximum,
            entropy_warmup=phase.entropy_driven,
        )
        return {
            "exploration": spec,
            "turn_ids": batch.turn_ids,
            "cu_seqlens": batch.cu_seqlens,
            "rebellious_weights": _spread(batch, [sample.rebellious for sample in side]),
            "mean_difference": self.difference.value,
            "mean_entropy": self.entropy.value,
        }

    def _measure_teacher(self, out: Any, scored: Any, taught: Tensor, measured: Measured) -> None:
        """The means of the next step, and the teacher's part of the log: teacher_kl is the mean of logp − teacher's logp."""
        for name, mean in (("difference", self.difference), ("taught_entropy", self.entropy)):
            if name in out.metrics:
                mean.add_sum(*out.metrics[name])
        count = taught.sum()
        gap = (scored.logprobs - out.outputs["teacher_logprobs"])[taught].sum()
        measured.add(teacher_kl=(gap, count), teacher_entropy=(out.outputs["teacher_entropy"][taught].sum(), count))


def _spread(batch: PackedBatch, values: Sequence[float | bool]) -> Tensor:
    """One value a trajectory at each of its response tokens [T]: float32, or bool for bools; 0 elsewhere."""
    lengths = batch.cu_seqlens.diff().to(torch.int64)
    dtype = torch.bool if isinstance(values[0], bool) else torch.float32
    spread = torch.tensor(values, dtype=dtype, device=lengths.device).repeat_interleave(lengths)
    return spread.where(batch.response_mask, torch.zeros((), dtype=dtype, device=lengths.device))
