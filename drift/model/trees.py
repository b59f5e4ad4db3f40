"""Attention over prefix trees: a token sees its ancestors and itself, whatever lies between them in the pack.

Rows lie depth first, so a segment (a run of rows without a branch) is followed by all of its descendants, and they all see
all of it. One causal call a segment, with its subtree's rows as queries and its own as keys, therefore covers every pair of
the tree once: nothing is masked in vain, no key is copied. The parts of a row, one from each ancestor, are merged by their
log-sum-exps, level by level. The backward pass has the same calls, each with the merged output and log-sum-exp.

On a CPU these calls are torch's flash kernel. A soft cap, or a window shorter than a path, takes plain products over the
keys of each path. On a GPU it is FlexAttention with a block mask made from `row_stops`, or flash-attn's varlen call over
each path's keys; neither has run on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # rows and columns of a FlexAttention block
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Span:
    """A segment of a tree; rows [start, stop) are its own, [stop, last) its descendants'."""

    start: int
    stop: int
    last: int
    depth: int  # position of its first row
    parent: int  # number of the segment that it continues, or -1
    level: int  # number of its ancestors


@dataclass(frozen=True, eq=False)
class Tree:
    """Stands in for a mask inside `attention.trees`."""

    spans: tuple[Span, ...]
    window: int | None = None  # of a layer with sliding attention; a token sees itself and window - 1 before it
    blocks: dict[Any, Any] = field(default_factory=dict)  # block masks by device and window

    @classmethod
    def of(cls, starts: list[int], parents: list[int], count: int) -> Tree:
        """The tree of `count` rows with these segments; an only child that follows its parent becomes part of it.

        Raises ValueError unless they lie depth first.
        """
        stops = [*starts[1:], count]
        if not starts or starts[0] != 0 or len(starts) != len(parents) or any(a >= b for a, b in zip(starts, stops)):
            raise ValueError(f"starts {starts} must begin with 0, rise strictly up to {count} rows, one to a parent")
        _check_order(parents)
        starts, parents = _joined(starts, parents)
        stops = [*starts[1:], count]
        path: list[int] = []
        last, depth, level = list(stops), [0] * len(starts), [0] * len(starts)
        for number, parent in enumerate(parents):
            while path and path[-1] != parent:
                path.pop()
            if path:
                depth[number] = depth[parent] + stops[parent] - starts[parent]
                level[number] = len(path)
            path.append(number)
            for above in path:
                last[above] = stops[number]
        return cls(tuple(map(Span, starts, stops, last, depth, parents, level)))

    @property
    def total(self) -> int:
        """Rows."""
        return self.spans[-1].stop

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest path."""
        return max(span.depth + span.stop - span.start for span in self.spans)

    def with_window(self, window: int | None) -> Tree:
        """For a layer of that sliding window, which says nothing where no path is longer."""
        return replace(self, window=window)

    @property
    def narrow(self) -> int | None:
        """The window, if any path is longer."""
        return None if self.window is None or self.window >= self.longest else self.window

    def path(self, number: int) -> list[Span]:
        """A segment's ancestors from the root down, and itself."""
        found = []
        while number >= 0:
            found.append(self.spans[number])
            number = found[-1].parent
        return found[::-1]

    def spread(self, name: str) -> Tensor:
        """A number of each row's segment, [R] int64."""
        values = torch.tensor([getattr(span, name) for span in self.spans])
        return values.repeat_interleave(torch.tensor([span.stop - span.start for span in self.spans]))

    def positions(self) -> Tensor:
        """Of each row its depth, [R] int64."""
        return torch.arange(self.total) - self.spread("start") + self.spread("depth")


def _check_order(parents: list[int]) -> None:
    """Raises ValueError unless segments lie depth first: each continues the one before it or one of that one's ancestors."""
    path: list[int] = []
    for number, parent in enumerate(parents):
        while path and path[-1] != parent:
            path.pop()
        if parent >= 0 and not path:
            raise ValueError(f"parents[{number}] is {parent}; segments must lie depth first, a parent before its own")
        path.append(number)


def _joined(starts: list[int], parents: list[int]) -> tuple[list[int], list[int]]:
    """Without the borders at which no path branches: there a trajectory ends and another goes on."""
    children = Counter(parents)
    joined: list[int] = []  # of each old segment its new number
    new_starts: list[int] = []
    new_parents: list[int] = []
    for start, parent in zip(starts, parents):
        if parent >= 0 and children[parent] == 1:
            joined.append(joined[parent])
            continue
        joined.append(len(new_starts))
        new_starts.append(start)
        new_parents.append(-1 if parent < 0 else joined[parent])
    return new_starts, new_parents


def attend(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float | None, softcap: float | None
) -> Tensor:
    """query [1, H, R, d], key and value [1, H_kv, R, d] → [1, R, H, d]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type != "cpu":
        return flex(query, key, value, tree, scale, softcap).transpose(1, 2).contiguous()
    groups = key.shape[1]
    grouped = query[0].unflatten(0, (groups, -1))  # [H_kv, H / H_kv, R, d]
    if softcap is not None or tree.narrow is not None:
        out = _by_path(grouped, key[0], value[0], tree, scale, softcap)
    else:
        out = _Merged.apply(grouped, key[0], value[0], tree, scale)
    return out.flatten(0, 1).transpose(0, 1)[None].contiguous()


class _Merged(torch.autograd.Function):
    """query [G, H / G, R, d], key and value [G, R, d] → [G, H / G, R, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        out, lse = query.new_zeros(query.shape, dtype=wide), None
        for level in range(max(span.level for span in tree.spans) + 1):
            part, weight = torch.zeros_like(out), query.new_full(query.shape[:-1], -torch.inf, dtype=wide)
            for span in tree.spans:
                if span.level == level:
                    o, s = _forward(*_blocks(query, key, value, span), 0.0, True, scale=scale)
                    part[:, :, span.start : span.last], weight[:, :, span.start : span.last] = o, s
            if lse is None:
                out, lse = part, weight
            else:
                merged = torch.logaddexp(lse, weight)
                out.mul_((lse - merged).exp_()[..., None]).addcmul_(part, (weight - merged).exp_()[..., None])
                lse = merged
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse = ctx.saved_tensors
        [grad] = grads
        wide = torch.promote_types(query.dtype, torch.float32)
        d_query = query.new_zeros(query.shape, dtype=wide)
        d_key, d_value = torch.empty_like(key), torch.empty_like(value)
        for span in ctx.tree.spans:
            rows = slice(span.start, span.last)
            sums, normal = out[:, :, rows], lse[:, :, rows]
            q, k, v = _backward(
                grad[:, :, rows], *_blocks(query, key, value, span), sums, normal, 0.0, True, scale=ctx.scale
            )
            d_query[:, :, rows] += q
            own = slice(span.start, span.stop)
            d_key[:, own], d_value[:, own] = k.sum(1), v.sum(1)
        return d_query.to(query.dtype), d_key, d_value, None, None


def _blocks(query: Tensor, key: Tensor, value: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
    """The subtree's queries, and the segment's keys and values once for each query head."""
    q, own = query[:, :, span.start : span.last], slice(span.start, span.stop)
    keys, values = (x[:, None, own].expand(-1, q.shape[1], -1, -1) for x in (key, value))
    return q, keys, values


def _by_path(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float, softcap: float | None) -> Tensor:
    """Plain products over the keys of each segment's path: for scores that torch's kernel does not know."""
    parts = []
    for number, span in enumerate(tree.spans):
        path = tree.path(number)
        keys, values = (torch.cat([x[:, s.start : s.stop] for s in path], 1)[:, None] for x in (key, value))
        scores = query[:, :, span.start : span.stop] @ keys.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(span.depth, span.depth + span.stop - span.start)[:, None] - torch.arange(keys.shape[2])
        hidden = (behind < 0) if tree.narrow is None else (behind < 0) | (behind >= tree.narrow)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=wide)
        parts.append(weights.to(values.dtype) @ values)
    return torch.cat(parts, 2)


# --- on a GPU ---


def visible(tree: Tree, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
    """FlexAttention's mask function: may row `q` see row `k`? Two [R] tensors at most, no [R, R] one."""
    stops = tree.spread("last").to(device)
    window, positions = tree.narrow, tree.positions().to(device)

    def see(b: Any, h: Any, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < stops[k])
        return seen if window is None else seen & (positions[q] - positions[k] < window)

    return see


def block_mask(tree: Tree, device: torch.device | str = "cpu", block: int = BLOCK) -> BlockMask:
    """Which blocks of rows and columns are seen, in part or whole, from segment spans: [R / block, R / block] and no more.

    A block below the diagonal is seen in part when one of its columns reaches past the block's first row, and whole when
    all of its columns reach past the last one. With a window, whole blocks are checked token by token too.
    """
    stops = tree.spread("last")
    count = -(-tree.total // block)
    pad = (0, count * block - tree.total)
    most = torch.nn.functional.pad(stops, pad, value=0).view(count, block).amax(1)
    least = torch.nn.functional.pad(stops, pad, value=tree.total).view(count, block).amin(1)
    first = torch.arange(count) * block
    past = (first + block).clamp(max=tree.total)
    below = first[None, :] < first[:, None]
    partly = torch.eye(count, dtype=torch.bool) | (below & (most[None, :] > first[:, None]))
    whole = below & (least[None, :] >= past[:, None]) if tree.narrow is None else torch.zeros_like(below)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        numbers = blocks.sum(1, dtype=torch.int32)
        indices = torch.argsort(blocks.int(), dim=1, descending=True, stable=True).int()
        return numbers[None, None].to(device), indices[None, None].to(device)

    return BlockMask.from_kv_blocks(
        *listed(partly & ~whole),
        *listed(whole),
        BLOCK_SIZE=block,
        mask_mod=visible(tree, device),
        seq_lengths=(tree.total, tree.total),
    )


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def flex(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float, softcap: float | None, compiled: bool = True
) -> Tensor:
    """FlexAttention over the tree's blocks; [1, H, R, d]."""
    where = (str(query.device), tree.narrow)
    if where not in tree.blocks:
        tree.blocks[where] = block_mask(tree, query.device)

    cap = torch.tensor(softcap or 1.0, device=query.device)  # torch 2.13 does not compile a captured float

    def capped(score: Tensor, *_: Any) -> Tensor:
        return cap * torch.tanh(score / cap)

    call = _compiled() if compiled else flex_attention
    return call(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=tree.blocks[where],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def varlen(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float | None, softcap: float | None, **options: Any
) -> Tensor:
    """flash-attn's varlen call: segments as queries against copies of their paths' keys, aligned at the end; [1, R, H, d]."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    paths = [tree.path(number) for number in range(len(tree.spans))]
    rows = torch.cat([torch.arange(span.start, span.stop) for path in paths for span in path]).to(query.device)
    lengths = [sum(span.stop - span.start for span in path) for path in paths]
    own = [span.stop - span.start for span in tree.spans]
    bounds = [torch.tensor([0, *counts]).cumsum(0).to(query.device, torch.int32) for counts in (own, lengths)]
    window = tree.narrow
    return flash_attn_varlen_func(
        query[0].transpose(0, 1),
        *(x[0].transpose(0, 1)[rows] for x in (key, value)),
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        max_seqlen_q=max(own),
        max_seqlen_k=max(lengths),
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        **options,
    )[None]
