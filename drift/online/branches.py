"""Both branches of an online step on one batch: the policy loss and the divergence from the teacher (B6, B7).

A student's pack goes through the model once, and so does a token that its trajectories share (`train.tree`). The same
trajectories under the teacher's prompts went through it before, with the teacher's weights in place and without gradient;
their hidden states are aligned with the student's rows,
token by token, and `drift_kernels.self_distill_loss` makes both losses of the two logits in one pass. Old log-probs are the
policy's own, of the same hidden states, so ratios are 1. The difference to the sampler's log-probs is corrected for, up to
a factor of 2 a token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import drift_kernels
from drift.config import Config
from drift.config.algorithms import ALGORITHMS, Algorithm
from drift.config.online import OnlineConfig
from drift.model.policy import Policy
from drift.online import examples
from drift.online.curriculum import Phase
from drift.online.samples import Sample
from drift.online.teacher import Teacher
from drift.rhythm import StepMean
from drift.training import layout, sharding
from drift.training.optimizer import MasterAdamW
from drift.training.reference import scoring
from drift.types import PackedBatch

SEEN = ("teacher_logprobs", "teacher_entropy", "divergence", "rhythm", "gate", "rebellious")  # the latter by the rhythm


@dataclass(frozen=True, slots=True)
class Denominators:
    """The denominator of each branch; 0 if nothing of the batch is in that branch."""

    policy: float
    distill: float


def denominators(batch: Sequence[Sample], config: OnlineConfig) -> Denominators:
    """Those of a step's global batch (`Sample.parts` of all ranks), by `config.denominators`; never of a pack or a rank's share.

    branch: for the policy the response tokens of samples with a policy weight, for the divergence those of samples with a
    teacher. shared: all response tokens, for both. A policy loss that is a mean over sequences counts sequences instead.
    """
    shared = config.denominators == "shared"
    policy = [sample for sample in batch if shared or sample.policy]
    taught = [sample for sample in batch if shared or sample.taught is not None]
    by_sequence = _spec(config).aggregation.startswith("sequence")
    tokens = sum(sample.tokens for sample in policy)
    return Denominators(len(policy) if by_sequence else tokens, sum(sample.tokens for sample in taught))


def _check_linear(head: drift_kernels.Head) -> None:
    """Raises ValueError unless two heads' logits can be mixed as one product: without a cap, and without LoRA on the head."""
    if head.softcap is not None:
        raise ValueError(
            f"online.teacher.weights 'trust_region' mixes logits, and this model caps them (softcap {head.softcap}), which "
            "is not linear; set online.teacher.weights=weight_mix (of weights) or ema"
        )
    if head.lora is not None:
        raise ValueError(
            "online.teacher.weights 'trust_region' mixes logits, which is not supported with LoRA on lm_head; set "
            "online.teacher.weights=weight_mix or ema, or leave lm_head out of model.lora.target_modules"
        )


def _spec(config: OnlineConfig) -> drift_kernels.PolicySpec:
    """The algorithm's policy loss, with the run's own clip and correction."""
    name, cap = ALGORITHMS[config.algorithm].policy, config.sampler_clip
    if name is None:
        raise ValueError(f"algorithm {config.algorithm} has no policy loss; it must be one of the online ones")
    changes: dict[str, Any] = {"correction": "token_truncate", "correction_bounds": (0.0, cap)} if cap else {}
    changes |= {k: v for k, v in (("clip_low", config.clip_low), ("clip_high", config.clip_high)) if v is not None}
    return drift_kernels.PolicySpec.preset(name, **changes)


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
        if config.online is None:
            raise ValueError("config.online is missing; give it, such as `online: {}`")
        self.policy, self.optimizer, self.train, self.online = policy, optimizer, config.train, config.online
        self.algorithm, self.difference, self.entropy = algorithm, difference, entropy
        self.spec = _spec(config.online)
        self.temperature = config.rollout.temperature
        if config.online.teacher.weights == "trust_region":
            _check_linear(policy.head())
        self.kernel = drift_kernels.KernelConfig(
            backend=config.train.backend, workspace_bytes=config.train.workspace_bytes
        )

    def accumulate(
        self,
        samples: Sequence[Sample],
        phase: Phase,
        teacher: Teacher | None,
        divide_by: Denominators,
        keep: Collection[int] = (),
        score: Collection[int] = (),
    ) -> Measured:
        """This rank's samples; divide_by: the `denominators` of the global batch.

        keep: places in the global batch of the samples whose tokens go into `Measured.examples`; score: of those whose
        log-probs under the policy, before the update, go into `Measured.logprobs`.
        """
        by_index = {sample.trajectory.index: sample for sample in samples}
        students = [sample.trajectory for sample in samples]
        packs = layout.packs(self.policy, students, self.train, turns="assistant")
        sides = [[by_index[index] for index in batch.indices] for batch in packs]
        device, measured = self.policy.device, Measured()
        flats = [layout.end_to_end(batch) for batch in packs]
        heads = self._teach(sides, flats, teacher) if teacher else [None] * len(packs)
        places = iter(zip(flats, sides, heads))
        for batch in sharding.rounds(self.policy.model, packs):
            if sharding.is_idle(batch):
                self._idle(batch.to(device))
                continue
            flat, side, head = next(places)
            logprobs = self._pack(batch.to(device), side, head, phase, divide_by, measured, keep)
            bounds = flat.cu_seqlens.tolist()
            for index, start, stop in zip(batch.indices, bounds, bounds[1:]):
                if index in score:
                    found = logprobs[start:stop][flat.response_mask[start:stop].to(device)]
                    measured.logprobs[index] = found.float().cpu()
        return measured

    def _teach(
        self, sides: Sequence[Sequence[Sample]], packs: Sequence[PackedBatch], teacher: Teacher
    ) -> list[drift_kernels.Teacher | None]:
        """The teacher of each pack, its hidden states at the student's rows; None for a pack without one."""
        with teacher.weights(), scoring(self.policy.model):
            hiddens, head = self._scored(sides, packs)
        if head is not None and (share := teacher.logit_mix):
            # (1 − mix)·teacher's logits + mix·policy's, as one product of twice the width
            with scoring(self.policy.model):
                own, policy = self._scored(sides, packs)
            assert policy is not None
            hiddens = [None if a is None or b is None else torch.cat((a, b), 1) for a, b in zip(hiddens, own)]
            weight = torch.cat(((1 - share) * head.weight, share * policy.weight), 1)
            bias = None if head.bias is None or policy.bias is None else torch.lerp(head.bias, policy.bias, share)
            head = replace(head, weight=weight, bias=bias)
        return [None if hidden is None or head is None else drift_kernels.Teacher(hidden, head) for hidden in hiddens]

    def _scored(
        self, sides: Sequence[Sequence[Sample]], packs: Sequence[PackedBatch]
    ) -> tuple[list[Tensor | None], drift_kernels.Head | None]:
        """Hidden states under the present weights of each pack's lessons, aligned with its rows, and a copy of the head.

        None for a pack without a lesson; no head if no pack of any rank has one.
        """
        lessons = [self._lesson(side) for side in sides]
        hiddens: list[Tensor | None] = [None] * len(sides)
        places = iter([place for place, lesson in enumerate(lessons) if lesson is not None])
        head: drift_kernels.Head | None = None
        given = [lesson for lesson in lessons if lesson is not None]
        for batch in sharding.rounds(self.policy.model, given, gradients=False):
            batch = batch.to(self.policy.device)
            hidden = layout.hidden_states(self.policy, batch)
            head = self.policy.head(self.temperature).clone() if head is None else head
            if not sharding.is_idle(batch):
                place = next(places)
                hiddens[place] = self._beside(hidden, batch, sides[place], packs[place])
        return hiddens, head

    def _lesson(self, side: Sequence[Sample]) -> layout.Batch | None:
        """The samples of a pack that have a teacher, under its prompts, as one pack."""
        taught = [sample.taught for sample in side if sample.taught is not None]
        if not taught:
            return None
        room = max(sum(len(t.token_ids) for t in taught), 2)
        whole = self.train.model_copy(update={"max_tokens": room, "max_length": room})
        [laid] = layout.packs(self.policy, taught, whole, turns="assistant")
        return laid

    def _beside(self, hidden: Tensor, lesson: layout.Batch, side: Sequence[Sample], batch: PackedBatch) -> Tensor:
        """The hidden states of the teacher's pack at the student's rows [T, D], 0 elsewhere."""
        rows = _spread(batch, [sample.taught is not None for sample in side]).to(hidden.device)
        beside = hidden.new_zeros(len(batch.targets), hidden.shape[1])
        beside[rows] = hidden[layout.end_to_end(lesson).response_mask]
        return beside

    def _idle(self, batch: layout.Batch) -> None:
        """A pass without a loss, for ranks that have packs."""
        flat, hidden = layout.end_to_end(batch), layout.hidden_states(self.policy, batch)
        options: dict[str, Any] = {"normalizer": 1.0, "active": flat.active, "config": self.kernel}
        head = self.policy.head(self.temperature)
        drift_kernels.weighted_cross_entropy(hidden, head, flat.targets, flat.token_weights, **options).loss.backward()

    def _pack(
        self,
        laid: layout.Batch,
        side: Sequence[Sample],
        teacher: drift_kernels.Teacher | None,
        phase: Phase,
        divide_by: Denominators,
        measured: Measured,
        keep: Collection[int],
    ) -> Tensor:
        """The policy's log-probs [T]; T counts tokens that trajectories share once for each."""
        batch, hidden = layout.end_to_end(laid), layout.hidden_states(self.policy, laid)
        head = self.policy.head(self.temperature)
        common: dict[str, Any] = {"config": self.kernel}
        with torch.no_grad():
            scored = drift_kernels.linear_logprob(hidden, head, batch.targets, outputs=("entropy",), **common)
        assert scored.entropy is not None
        assert batch.advantages is not None
        routes = [phase.weights(s.taught is not None, s.distill, s.policy, s.rebellious) for s in side]
        distill, policy, rebellious = (_spread(batch, column) for column in zip(*routes))
        normalizer = divide_by.policy or divide_by.distill or 1.0  # the op has one for both; distill_coef corrects it
        common |= {
            "old_logprobs": scored.logprobs,
            "rollout_logprobs": batch.rollout_logprobs,
            "normalizer": normalizer,
        }
        if teacher is None:
            out = drift_kernels.policy_loss(
                hidden,
                head,
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
                head,
                batch.targets,
                teacher,
                batch.advantages,
                distill_weights=self._sampled_by(batch, scored.logprobs) * distill,
                policy_weights=policy,
                distill_coef=self.online.distill.weight * normalizer / (divide_by.distill or 1.0),
                has_teacher=has_teacher,
                policy=self.spec,
                distill=self._divergence(),
                outputs=SEEN if self.algorithm.rhythm else SEEN[:3],
                **self._exploration(batch, rebellious, phase),
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
        measured.add(tokens_shared=(len(batch.input_ids) - len(laid.input_ids), len(batch.input_ids)))
        pairs, own = (int((pack.position_ids + 1).sum()) for pack in (batch, laid))
        measured.add(attention_shared=(pairs - own, pairs))
        measured.add(entropy=(scored.entropy[mask].sum(), count))
        if batch.rollout_logprobs is not None:
            measured.add(sampler_kl=((batch.rollout_logprobs - scored.logprobs)[mask].sum(), count))
        measured.add(**{name.replace("/", "_"): pair for name, pair in out.metrics.items() if name != "taught_entropy"})
        return scored.logprobs

    def _sampled_by(self, batch: PackedBatch, logprobs: Tensor) -> Tensor | float:
        """The divergence's correction of sampler against trainer, min(exp(logp − rollout), clip) a token (B7)."""
        clip = self.online.sampler_clip
        if clip is None or batch.rollout_logprobs is None:
            return 1.0
        return (logprobs - batch.rollout_logprobs).clamp(-20, 20).exp().clamp(max=clip)

    def _example(
        self, batch: PackedBatch, segment: int, sample: Sample, values: dict[str, Tensor], phase: Phase
    ) -> dict[str, Any]:
        """The stored values of a sample (see `drift.online.examples`); without a teacher, the student's alone."""
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
            "routing": phase.routing,
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

    def _exploration(self, batch: PackedBatch, rebellious: Tensor, phase: Phase) -> dict[str, Any]:
        """Arguments of the exploration weights. In warm-up the divergence is plain SDPO's."""
        if not self.algorithm.rhythm:
            return {}
        settings = self.online.rhythm
        spec = drift_kernels.ExplorationSpec(
            rhythm_maximum=settings.maximum,
            weigh_divergence=settings.weigh_divergence and phase.name != "warmup",
            gate=settings.gate,
            gate_floor=settings.floor,
            gate_power=settings.power,
            margin=settings.margin,
            gamma=settings.bonus_gamma,
            bonus_maximum=settings.bonus_maximum,
            entropy_warmup=phase.weigh_by_entropy,
        )
        exploration = drift_kernels.Exploration(
            spec, batch.turn_ids, rebellious, self.difference.value, self.entropy.value
        )
        return {"exploration": exploration, "cu_seqlens": batch.cu_seqlens}

    def _measure_teacher(self, out: Any, scored: Any, taught: Tensor, measured: Measured) -> None:
        """The means of the next step, and the teacher's part of the log, over tokens with a teacher.

        teacher_kl: the mean of logp − teacher's logp. gate_open: the share of tokens whose gate is more than half open.
        bonus_share: the share of tokens whose policy loss counts more than once.
        """
        for name, mean in (("difference", self.difference), ("taught_entropy", self.entropy)):
            if name in out.metrics:
                mean.add_sum(*out.metrics[name])
        count = taught.sum()
        gap = (scored.logprobs - out.outputs["teacher_logprobs"])[taught].sum()
        measured.add(teacher_kl=(gap, count), teacher_entropy=(out.outputs["teacher_entropy"][taught].sum(), count))
        if self.algorithm.rhythm:
            opened, bonus = (out.outputs[name][taught] for name in ("gate", "rebellious"))
            measured.add(gate_open=((opened > 0.5).sum(), count), bonus_share=((bonus > 1).sum(), count))


def _spread(batch: PackedBatch, values: Sequence[float | bool]) -> Tensor:
    """One value a trajectory at each of its response tokens [T]: float32, or bool for bools; 0 elsewhere."""
    lengths = batch.cu_seqlens.diff().to(torch.int64)
    dtype = torch.bool if isinstance(values[0], bool) else torch.float32
    spread = torch.tensor(values, dtype=dtype, device=lengths.device).repeat_interleave(lengths)
    return spread.where(batch.response_mask, torch.zeros((), dtype=dtype, device=lengths.device))
