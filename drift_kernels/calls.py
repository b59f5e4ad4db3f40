"""A whole call as one frozen value that travels as text: the specs of its loss, its heads' options, how it runs."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from drift_kernels.checks import constant, number, one_of
from drift_kernels.distill_spec import DistillSpec, ExplorationSpec
from drift_kernels.spec import PolicySpec

KERNEL_BACKENDS = ("cpu", "triton", "cuda")  # modules of drift_kernels.backends with row kernels
BACKENDS = ("auto", "reference", *KERNEL_BACKENDS)


@dataclass(frozen=True)
class KernelConfig:
    """How an op runs; never what it computes.

    backend          "auto" picks by the device of `hidden`; asking for one that cannot run raises with its reason
    workspace_bytes  scratch for logits and what goes with them; None = 256 MiB on a CPU; on a GPU a
                     quarter of its free memory, at least 1 GiB
    check_finite     raise on non-finite `old_logprobs`, `ref_logprobs`, advantages or weights of rows that count
    accumulate_into_grad  add dW, times this number, to the fp32 `weight.grad` in the forward: no [V, D] of its own. The number
                     is what backward will scale the loss by (1 for loss.backward()); backward raises where it is another
    """

    backend: str = "auto"
    workspace_bytes: int | None = None
    check_finite: bool = False
    accumulate_into_grad: float | None = None

    def __post_init__(self) -> None:
        one_of("backend", self.backend, BACKENDS)
        if not isinstance(self.check_finite, bool):
            raise TypeError(f"check_finite={self.check_finite!r} must be True or False")
        if self.workspace_bytes is not None and not isinstance(self.workspace_bytes, int):
            raise TypeError(f"workspace_bytes={self.workspace_bytes!r} must be a whole number of bytes, or None")
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes={self.workspace_bytes} must be positive, or None for the default")
        scale = number("accumulate_into_grad", self.accumulate_into_grad, optional=True)
        object.__setattr__(self, "accumulate_into_grad", scale)


@dataclass(frozen=True)
class Share:
    """A rank's part of a vocabulary that is spread over a process group: tokens first … first + rows of the weight."""

    group: str  # name of the process group
    first: int
    vocabulary: int  # V of all parts together
    gather: bool = False  # hidden rows differ between ranks and are gathered (`GatherHidden`)


@dataclass(frozen=True)
class HeadOptions:
    """A head apart from its tensors.

    From a product h·Wᵀ to a logit: z = softcap(logit_scale·(h·Wᵀ + b)) / temperature, softcap(u) = c·tanh(u/c).
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100
    share: Share | None = None  # None: the whole vocabulary is here

    def __post_init__(self) -> None:
        for name in ("temperature", "logit_scale", "softcap"):
            object.__setattr__(self, name, number(name, getattr(self, name), optional=name == "softcap"))
        if isinstance(self.ignore_index, bool) or not hasattr(self.ignore_index, "__index__"):
            raise TypeError(f"ignore_index={self.ignore_index!r} must be an integer")
        object.__setattr__(self, "ignore_index", int(self.ignore_index))
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; score greedy samples with 1.0")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap} must be positive, or None")

    def vocabulary(self, rows: int) -> int:
        """V of a head whose weight has so many rows here."""
        return rows if self.share is None else self.share.vocabulary

    @property
    def plain(self) -> bool:
        """Whether a logit is the product itself, but for a bias or a temperature per row."""
        return self.temperature == 1.0 and self.softcap is None and self.logit_scale == 1.0


@dataclass(frozen=True)
class Call:
    """All that a registered op needs besides tensors; `encode` makes it a schema's string."""

    spec: PolicySpec = PolicySpec()
    head: HeadOptions = HeadOptions()
    config: KernelConfig = KernelConfig()
    outputs: tuple[str, ...] = ()
    need_hidden: bool = False
    need_weight: bool = False
    need_bias: bool = False
    need_lora_a: bool = False
    need_lora_b: bool = False
    lora_scale: float = 1.0
    accumulate_scale: float | None = None  # factor on what is added to a weight's gradient in place

    @property
    def needs(self) -> tuple[bool, bool, bool, bool, bool]:
        """Which gradients are wanted: of hidden, weight, bias, LoRA's A and B."""
        return self.need_hidden, self.need_weight, self.need_bias, self.need_lora_a, self.need_lora_b

    def __post_init__(self) -> None:
        if not isinstance(self.config, KernelConfig):
            raise TypeError(f"config={self.config!r} must be a KernelConfig, such as KernelConfig(backend='cpu')")

    @property
    def need_grad(self) -> bool:
        """Whether any gradient is wanted: without, an op costs one GEMM."""
        return any(self.needs)

    def scoring(self, outputs: tuple[str, ...]) -> Call:
        """The same call without gradients, for other outputs."""
        return replace(
            self,
            outputs=outputs,
            need_hidden=False,
            need_weight=False,
            need_bias=False,
            need_lora_a=False,
            need_lora_b=False,
            accumulate_scale=None,
        )

    def encode(self) -> str:
        """As text, for an op's schema: a literal tuple (a JSON encoder would break a compiled graph)."""
        return repr(_pack(Call, self))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Call:
        """The inverse of `encode`."""
        return _unpack(Call, ast.literal_eval(text))


@dataclass(frozen=True)
class DistillCall:
    """As `Call`, for ops with a teacher."""

    student: Call  # its spec is the policy's
    distill: DistillSpec
    teacher: HeadOptions
    teacher_lora_scale: float = 1.0
    exploration: ExplorationSpec | None = None
    policy: bool = False  # whether there is a policy term
    teach_all: bool = False  # an output reads the teacher on rows of weight 0 too

    def encode(self) -> str:
        """As text, for an op's schema."""
        return repr(_pack(DistillCall, self))

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> DistillCall:
        """The inverse of `encode`."""
        return _unpack(DistillCall, ast.literal_eval(text))


def _parts(kind: type) -> tuple[tuple[str, type | None], ...]:
    """(name, dataclass that it holds or None) of each field."""
    hints = get_type_hints(kind)
    held = {
        n: [t for t in (hint, *get_args(hint)) if isinstance(t, type) and is_dataclass(t)] for n, hint in hints.items()
    }
    return tuple((f.name, held[f.name][0] if held[f.name] else None) for f in fields(kind))


PARTS = {
    kind: _parts(kind)
    for kind in (PolicySpec, Share, HeadOptions, KernelConfig, DistillSpec, ExplorationSpec, Call, DistillCall)
}


def _pack(kind: type, value: Any) -> Any:
    """The frozen `value` as nested tuples of its fields."""
    if value is None:
        return None
    return tuple(
        [
            _plain(getattr(value, name)) if part is None else _pack(part, getattr(value, name))
            for name, part in PARTS[kind]
        ]
    )


def _plain(value: Any) -> Any:
    """A field that is no dataclass, as it travels."""
    return tuple([constant(v) for v in value]) if isinstance(value, tuple) else constant(value)


def _unpack(kind: type, packed: tuple) -> Any:
    """The frozen value that `_pack` was given."""
    values = zip(PARTS[kind], packed)
    return kind(**{name: v if part is None or v is None else _unpack(part, v) for (name, part), v in values})
