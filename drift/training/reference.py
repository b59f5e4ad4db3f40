"""How far a policy has gone from the one that it started as, on tokens that were sampled: a forward pass each, no logits.

The estimator is k3: with x = logp_other − logp of a token that the *first* policy sampled, exp(x) − 1 − x is never
negative and its mean is KL(first‖other). Log-probs are at the temperature that tokens were sampled with.

Left out: a reference that is another model. TRL and verl take one for the loss; here it is only watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import drift_kernels
from drift.config import Config
from drift.model.policy import Policy, evaluating
from drift.training import distributed, layout, sharding
from drift.types import PackedBatch, Trajectory, TreeBatch


class Reference:
    """The policy as it is when this is made, or as `start` (of `Policy.state`) has it, to be compared with what it becomes.

    That is a copy of the parameters that are trained; for LoRA the adapters alone, and where they are new, the reference is
    the model without them. While it compares, the policy's own are kept beside.
    """

    def __init__(self, policy: Policy, config: Config, start: dict[str, Tensor] | None = None) -> None:
        self.policy, self.config, self.start = policy, config, policy.state() if start is None else start

    def kl(self, trajectories: Sequence[Trajectory], most: int, logprobs: Mapping[int, Tensor] | None = None) -> float:
        """KL(policy‖reference), nats a token, over up to `most` of the trajectories, evenly spread.

        The trajectories are those that the policy sampled on all ranks. Every rank calls this, with the same ones.
        logprobs: the policy's own of their assistant tokens, as `score` gives them, by `Trajectory.index`, where a step has
        them already (`chosen`); else the policy is run once more.
        """
        if logprobs is None:
            (now, _), (before, _) = self._scores(trajectories, most)
        else:
            mine = distributed.share(chosen(trajectories, most))
            order = [index for batch in _packs(self.policy, mine, self.config) for index in batch.indices]
            now = torch.cat([torch.zeros(0), *(logprobs[index] for index in order)])
            before = self._before(mine)[0]
        return _means(k3(now, before))[0]

    def moved(self, trajectories: Sequence[Trajectory], most: int) -> dict[str, float]:
        """What became of a policy that was trained on trajectories that the reference sampled, of which up to `most` are read.

        base_kl: KL(reference‖policy); entropy, base_entropy: of policy and reference; nats a token. Called as `kl` is.
        """
        (now, entropies), (before, its) = self._scores(trajectories, most)
        return dict(zip(("base_kl", "entropy", "base_entropy"), _means(k3(before, now), entropies, its)))

    def _scores(
        self, trajectories: Sequence[Trajectory], most: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        mine = distributed.share(chosen(trajectories, most))
        return score(self.policy, mine, self.config), self._before(mine)

    def _before(self, mine: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
        with sharding.settled(self.policy.model):
            state = self.policy.state()
            try:
                self.policy.restore(self.start)
                return score(self.policy, mine, self.config)
            finally:
                self.policy.restore(state)


def chosen(trajectories: Sequence[Any], most: int) -> Sequence[Any]:
    """Up to `most` of them, evenly spread."""
    return trajectories[:: -(-len(trajectories) // most)]


def _means(*values: Tensor) -> list[float]:
    """Over all ranks' tokens."""
    *totals, count = distributed.sum_values(*(float(v.sum(dtype=torch.float64)) for v in values), len(values[0]))
    return [total / max(count, 1) for total in totals]


def k3(logprobs: Tensor, others: Tensor) -> Tensor:
    """exp(x) − 1 − x with x = others − logprobs, of tokens that the policy of `logprobs` sampled."""
    x = others - logprobs
    return torch.expm1(x) - x


def score(policy: Policy, trajectories: Sequence[Trajectory], config: Config) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of every assistant token under the policy's present weights, both [N] fp32.

    Every rank of a policy that is spread calls this, with trajectories of its own. Their order follows from the
    trajectories and `config.train` alone. Dropout is off, and there is no gradient.
    """
    train = config.train
    kernel = drift_kernels.KernelConfig(backend=train.backend, workspace_bytes=train.workspace_bytes)
    found: list[tuple[Tensor, Tensor]] = [(torch.zeros(0), torch.zeros(0))]
    with scoring(policy.model):
        for batch in sharding.rounds(policy.model, _packs(policy, trajectories, config), gradients=False):
            batch = batch.to(policy.device)
            if sharding.is_idle(batch):
                policy.hidden(batch)
                continue
            out = score_pack(policy, batch, config.rollout.temperature, outputs=("entropy",), config=kernel)
            assert out.entropy is not None
            mask = layout.end_to_end(batch).response_mask
            found.append((out.logprobs[mask].float().cpu(), out.entropy[mask].float().cpu()))
    logprobs, entropies = zip(*found)
    return torch.cat(logprobs), torch.cat(entropies)


def _packs(policy: Policy, trajectories: Sequence[Trajectory], config: Config) -> Sequence[PackedBatch | TreeBatch]:
    return layout.packs(policy, trajectories, config.train, turns="assistant")


def score_pack(policy: Policy, batch: PackedBatch | TreeBatch, temperature: float | Tensor, **options: Any) -> Any:
    """`drift_kernels.linear_logprob` of a pack on the policy's device; `temperature` for all of it, or [T].

    A tree's log-probs are those of its flat pack.
    """
    hidden, targets = layout.hidden_states(policy, batch), layout.end_to_end(batch).targets
    return drift_kernels.linear_logprob(hidden, policy.head(temperature), targets, **options)


@contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Inside, no dropout and no gradients; unlike inference mode, what is made may enter a loss."""
    with evaluating(model), torch.no_grad(), sharding.settled(model):
        yield
