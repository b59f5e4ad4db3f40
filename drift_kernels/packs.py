"""Whether a backbone keeps the sequences of a pack apart: two short sequences, packed, against each one alone.

    from drift_kernels.packs import check_packing
    borders = check_packing(model)          # PackingError if one sequence reads another's state

Attention is told the borders of a pack by position ids. Linear attention, state-space layers and convolutions are not:
their state runs on from one sequence into the next, unless the layer takes borders of its own (`cu_seq_lens_q`,
`seq_idx`). Which families do so changes with the release, the device and the kernels that are installed; so a model is
measured and never looked up in a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from drift_kernels.tensors import is_dtensor

LENGTHS = (9, 140)  # the second one is longer than the blocks of block-wise layers (64, 128)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of half types: HALF
HALF = 5e-2


class PackingError(NotImplementedError):
    """A model that does not keep the sequences of a pack apart."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Tokens of several sequences in one row, and the rows that make up each sequence.

    tokens     [T] int64
    positions  [T] int64, of each token in its sequence
    paths      one [L] int64 a sequence: its rows of the layout, in order; sequences of a tree share rows
    """

    tokens: Tensor
    positions: Tensor
    paths: tuple[Tensor, ...]

    @property
    def bounds(self) -> Tensor:
        """[S + 1] int32, where each sequence begins and ends; of a layout whose sequences stand end to end."""
        lengths = torch.tensor([0, *(len(path) for path in self.paths)])
        return lengths.cumsum(0).to(torch.int32)

    def alone(self, number: int) -> Layout:
        """One of its sequences in a layout of its own."""
        path = self.paths[number]
        return Layout(self.tokens[path], self.positions[path], (torch.arange(len(path)),))


def flat(lengths: Sequence[int], vocabulary: int, *, seed: int = 0) -> Layout:
    """Random sequences end to end. lengths: at least two, each at least 1."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    low = min(3, vocabulary - 1)  # the first ids are padding and the like, the highest ones images
    tokens = torch.randint(low, max(low + 1, min(vocabulary, 256)), (total,), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Layout(tokens, positions, tuple(torch.arange(total).split(list(lengths))))


Forward = Callable[[Layout, dict[str, Any]], Tensor]  # (layout, borders to pass) -> hidden states [T, D]


def leak(forward: Forward, layout: Layout, *, borders: bool = False) -> float:
    """How far a token's hidden state is from that of its sequence alone, at most, relative to its norm.

    forward: the model over a layout, as it will be trained over it, given the arguments to pass on: none, or with
    `borders` those of `border_arguments`. Gradients are not recorded. NaN counts as infinite.
    """

    def run(part: Layout) -> Tensor:
        return forward(part, border_arguments(part.bounds) if borders else {}).float()

    worst = 0.0
    with torch.no_grad():
        packed = run(layout)
        for number, path in enumerate(layout.paths):
            alone = run(layout.alone(number))
            apart = (packed[path.to(packed.device)] - alone).norm(dim=-1) / alone.norm(dim=-1).clamp(min=1e-6)
            difference = float(apart.max())
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def border_arguments(bounds: Tensor) -> dict[str, Any]:
    """The borders of sequences that stand end to end, under all names that transformers' layers take them by.

    bounds: [S + 1] int32, from 0 to T, on the model's device. seq_idx is [1, T] int32, the number of each token's sequence.
    """
    lengths = bounds.diff().long()
    longest = int(lengths.max())
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=bounds.device)
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(numbers, lengths)[None],
    }


def check_packing(
    model: Any, layout: Layout | None = None, forward: Forward | None = None, *, borders: Sequence[bool] = (False, True)
) -> bool:
    """Whether layers need the borders of a pack as arguments; PackingError if they mix its sequences either way.

    model     a transformers causal LM; in the check it is in eval mode and, a block at a time, in float32
    layout    default: two sequences of random tokens, end to end
    forward   default: the backbone on `input_ids` [1, T] and `position_ids` that restart, without a mask or a cache
    borders   what is tried, in order: without the arguments of `border_arguments`, with them

    Takes a second or so: the model runs over twice the layout's tokens for each try. The message has what was measured.
    """
    text = model.config.get_text_config()
    layout = layout or flat(_lengths_for(text), text.vocab_size)
    forward = forward or backbone_of(model)
    reasons: list[str] = []
    with _checking(model):
        for passed in borders:
            how = "with its borders as arguments" if passed else "by position ids alone"
            try:
                difference = leak(forward, layout, borders=passed)
            except (ValueError, TypeError, RuntimeError, AttributeError, ImportError) as error:
                reasons.append(f"{how} it says {' '.join(str(error).split())!r}")
                continue
            if difference <= tolerance(model):
                return passed
            reasons.append(f"{how} hidden states differ by up to {difference:.0%}")
    raise PackingError(
        f"{type(model).__name__} does not keep the sequences of a pack apart. Two short sequences in a pack, compared with "
        f"each one alone: {'; '.join(reasons)}. Layers with a state (linear attention, state space, convolution) need "
        "kernels that take borders (flash-linear-attention, causal-conv1d, mamba-ssm, on a GPU)"
    )


BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_checked: WeakKeyDictionary[Any, set[frozenset[str]]] = WeakKeyDictionary()


def check_batch(model: Any, batch: Mapping[str, Any]) -> None:
    """Raises PackingError if `batch` packs several sequences into one row and `model` mixes them, given what it says of them.

    batch: the arguments of a forward pass, such as those of `DataCollatorWithFlattening` or of TRL's `padding_free`: one
    row without a mask, whose `position_ids` restart. The model is measured once for each set of border arguments.
    """
    ids, positions = batch.get("input_ids"), batch.get("position_ids")
    one_row = ids is not None and ids.shape[0] == 1 and batch.get("attention_mask") is None
    names = frozenset(name for name in BORDERS if batch.get(name) is not None)
    done = _checked.setdefault(model, set())
    if not one_row or names in done:
        return
    restarts = positions is not None and positions.dim() == 2 and bool((positions[0].diff() != 1).any())
    if not restarts and not (names and batch.get("cu_seq_lens_q", torch.empty(0)).numel() != 2):
        return
    backbone = backbone_of(model)

    def forward(layout: Layout, borders: dict[str, Any]) -> Tensor:
        return backbone(layout, {name: borders[name] for name in names})

    check_packing(model, forward=forward, borders=[bool(names)])
    done.add(names)


def backbone_of(model: Any) -> Forward:
    """The model below its head, over a layout whose sequences stand end to end."""
    backbone = model.base_model

    def forward(layout: Layout, borders: dict[str, Any]) -> Tensor:
        device = next(backbone.parameters()).device
        out = backbone(
            input_ids=layout.tokens[None].to(device),
            position_ids=layout.positions[None].to(device),
            attention_mask=None,
            use_cache=False,
            **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in borders.items()},
        )
        return out.last_hidden_state[0]

    return forward


def tolerance(model: Any) -> float:
    """Of `leak`, relative: rounding alone stays below it."""
    return TOLERANCE.get(_computed_in(model), HALF)


def _lengths_for(config: Any) -> tuple[int, int]:
    """Of the two sequences; shorter where the model has fewer positions."""
    most = getattr(config, "max_position_embeddings", None)
    return LENGTHS[0], min(LENGTHS[1], most) if isinstance(most, int) and most > 0 else LENGTHS[1]


def _computed_in(model: Any) -> torch.dtype:
    """The type that the check computes in: float32, unless the attention takes half types alone."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    sharded = any(is_dtensor(p) for p in model.parameters())  # FSDP2 gathers them itself
    return dtype if sharded or _half_only(model) or dtype == torch.float64 else torch.float32


def _half_only(model: Any) -> bool:
    return "flash" in str(getattr(model.config, "_attn_implementation", "")) and next(model.parameters()).is_cuda


@contextmanager
def _checking(model: Any) -> Iterator[None]:
    """Inside, the model is in eval mode and computes in float32, one block's weights at a time; all is put back after it."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    handles: list[Any] = []
    try:
        if _computed_in(model) == torch.float32:
            handles = _in_float32(model)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training


def _in_float32(model: nn.Module) -> list[Any]:
    """Hooks that give a block float32 weights while it runs. A block: an entry of a ModuleList, or what lies outside."""
    blocks = [m for holder in model.modules() if isinstance(holder, nn.ModuleList) for m in holder]
    inner = {m for block in blocks for m in block.modules() if m is not block}
    blocks = [block for block in blocks if block not in inner]
    covered = {m for block in blocks for m in block.modules()}
    outside = [m for m in model.modules() if m not in covered and not isinstance(m, nn.ModuleList)]
    handles = []
    for module, deep in [*((b, True) for b in blocks), *((m, False) for m in outside)]:
        tensors = [t for t in _floats(module, deep) if t.dtype in (torch.float16, torch.bfloat16)]
        if tensors:
            handles += _casting(module, tensors)
    return handles


def _floats(module: nn.Module, deep: bool) -> list[Tensor]:
    return [*module.parameters(recurse=deep), *module.buffers(recurse=deep)]


def _casting(module: nn.Module, tensors: list[Tensor]) -> list[Any]:
    kept: list[Tensor] = []

    def before(*_: Any) -> None:
        kept[:] = [t.data for t in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.float()

    def after(*_: Any) -> None:
        for tensor, data in zip(tensors, kept):
            tensor.data = data
        kept.clear()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
