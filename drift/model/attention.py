"""Packed causal attention for transformers models: flash-attn varlen on a GPU, one SDPA call a segment elsewhere.

`register` puts an implementation under a name of ours into transformers' attention and mask tables; a model loaded with
`attn_implementation=name` then obeys `segments`. The segments travel as the model's attention mask, that is, as an
argument of every layer: so a checkpointed layer that is run again in the backward pass, after the context has closed,
still sees those of its own forward.

Left out: batching segments of one length into one SDPA call. Gathering the rows cost what the fewer calls saved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from drift.model import trees
from drift.model.trees import Tree
from drift.types import PackedBatch, TreeBatch

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Segments:
    """What stands in for a mask inside `segments`: where each trajectory of the pack begins and ends."""

    cu_seqlens: torch.Tensor  # [S + 1] int32, on the device of the call
    lengths: tuple[int, ...]  # [S], the same on the host
    window: int | None = None  # of a layer with sliding attention; a token sees itself and window - 1 before it

    @property
    def total(self) -> int:
        """Tokens."""
        return sum(self.lengths)


_active: ContextVar[Segments | Tree | None] = ContextVar("drift_segments", default=None)


@contextmanager
def segments(cu_seqlens: torch.Tensor) -> Iterator[Segments]:
    """Inside, a registered model's [1, T] input is S segments end to end, each attending causally to itself alone.

    cu_seqlens: [S + 1] int32, from 0 to T, strictly rising. Call the model with `position_ids` that restart at each
    segment, `use_cache=False` and no attention mask. Raises ValueError for other cu_seqlens; the model call raises
    where it is not a packed one, or where the model asks for a mask of its own.
    """
    bounds = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    lengths = tuple(stop - start for start, stop in pairwise(bounds))
    if not lengths or bounds[0] != 0 or min(lengths) < 1:
        raise ValueError(f"cu_seqlens {cu_seqlens.tolist()} should be [S + 1], rise strictly and begin with 0")
    token = _active.set(Segments(cu_seqlens.to(torch.int32), lengths))
    try:
        yield _active.get()  # type: ignore[misc]
    finally:
        _active.reset(token)


@contextmanager
def tree(starts: torch.Tensor, parents: torch.Tensor, rows: int) -> Iterator[Tree]:
    """Inside, a registered model's [1, rows] input is a forest of prefix trees: a token attends to its ancestors and itself.

    starts, parents: [G] int64, as in `drift.types.TreeBatch`. Call the model with `position_ids` that are depths,
    `use_cache=False` and no attention mask. Raises ValueError unless the segments lie depth first; the model call raises
    as it does inside `segments`.
    """
    made = Tree.of(starts.tolist(), parents.tolist(), rows)
    token = _active.set(made)
    try:
        yield made
    finally:
        _active.reset(token)


def layout(batch: PackedBatch | TreeBatch) -> AbstractContextManager[Segments | Tree]:
    """`segments` or `tree`, as the batch is laid out."""
    if isinstance(batch, TreeBatch):
        return tree(batch.starts, batch.parents, len(batch.input_ids))
    return segments(batch.cu_seqlens)


def unavailable(kind: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why `kind` ("varlen" or "sdpa") cannot run, or None if it can. `device` and `dtype`: the model's, if known."""
    if kind == "sdpa":
        return None
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed; install it with: pip install flash-attn"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device is not None and torch.device(device).type != "cuda":
        return f"the model is on {device}, flash-attn needs CUDA"
    if dtype is not None and dtype not in HALF:
        return f"the model is in {dtype}, flash-attn takes float16 and bfloat16"
    return None


def register(
    kind: Literal["auto", "varlen", "sdpa"] = "auto",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Registers packed attention with transformers and returns the name to load a model with (`attn_implementation=`).

    auto takes varlen where it can run (for a model of that device and type, if they are given), else sdpa. Outside
    `segments` either is transformers' own sdpa with the mask it is given: `generate` works as ever. May be called
    again. Raises ValueError for another kind, or for varlen where it cannot run, with the reason.
    """
    if kind not in ("auto", "varlen", "sdpa"):
        raise ValueError(f"attention {kind!r} should be one of auto, varlen, sdpa")
    reason = unavailable("varlen", device=device, dtype=dtype)
    if kind == "varlen" and reason:
        raise ValueError(f"attention 'varlen' cannot run: {reason}; attention=sdpa or auto would do")
    chosen = "sdpa" if kind == "sdpa" or reason else "varlen"
    name = f"drift_{chosen}"
    AttentionInterface.register(name, _varlen_forward if chosen == "varlen" else _sdpa_forward)
    AttentionMaskInterface.register(name, _mask)  # type: ignore[arg-type]
    return name


def _mask(*args: Any, **kwargs: Any) -> Any:
    """transformers' mask hook: the segments inside the context, its own sdpa mask outside."""
    active = _active.get()
    if active is None:
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("attention_mask") is not None:
        raise ValueError("attention_mask should not be given inside segments(): packed tokens have no padding")
    if kwargs.get("use_vmap") or kwargs.get("allow_is_bidirectional_skip"):
        raise ValueError("this model asks for a mask that is not causal; packed attention is causal only")
    return replace(active, window=kwargs.get("local_size"))


def _sdpa_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """query [1, H, T, d], key and value [1, H_kv, T, d] → [1, T, H, d], None."""
    if not isinstance(attention_mask, (Segments, Tree)):
        return _outside(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if isinstance(attention_mask, Tree):
        _check(attention_mask, module, query, key, kwargs, takes=("softcap",))
        if dropout:
            raise ValueError(f"{type(module).__name__} drops attention weights, which trees do not; set train.tree=off")
        return trees.attend(query, key, value, attention_mask, scaling, kwargs.get("softcap")), None
    _check(attention_mask, module, query, key, kwargs, takes=())
    lengths, window = list(attention_mask.lengths), attention_mask.window
    pieces = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)):
        band = _band(q.shape[2], window, q.device)
        pieces.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=band,
                dropout_p=dropout,
                is_causal=band is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(pieces, 2).transpose(1, 2).contiguous(), None


def _varlen_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The same by flash-attn, in one call."""
    if not isinstance(attention_mask, (Segments, Tree)):
        return _outside(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    _check(attention_mask, module, query, key, kwargs, takes=("softcap",))
    if query.dtype not in HALF:
        raise ValueError(f"flash-attn takes float16 and bfloat16, not {query.dtype}; attention=sdpa would do")
    if isinstance(attention_mask, Tree):
        return trees.varlen(query, key, value, attention_mask, scaling, kwargs.get("softcap"), dropout_p=dropout), None
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    bounds, longest = attention_mask.cu_seqlens.to(query.device), max(attention_mask.lengths)
    out = flash_attn_varlen_func(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if attention_mask.window is None else (attention_mask.window - 1, 0),
        softcap=kwargs.get("softcap") or 0.0,
    )
    return out[None], None


def _outside(module, query, key, value, attention_mask, **kwargs):
    """Ordinary sdpa, unless the caller stands inside `segments` with a model that never asked for our mask."""
    if _active.get() is not None:
        raise RuntimeError(
            f"{type(module).__name__} is called inside segments() but makes its mask without transformers' mask "
            "functions (or was given one): the pack would leak between trajectories"
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _check(
    mask: Segments | Tree, module: Any, query: Any, key: Any, options: dict[str, Any], takes: tuple[str, ...]
) -> None:
    """Raises ValueError if the call is not a packed one, or asks for what this implementation does not do."""
    total = mask.total
    if query.shape[0] != 1 or query.shape[2] != total or key.shape[2] != total:
        raise ValueError(
            f"inside a pack of {total} tokens the model should see [1, {total}] ids and no cache; "
            f"it saw queries [{query.shape[0]}, {query.shape[2]}] and {key.shape[2]} keys"
        )
    for name in ("softcap", "position_bias", "s_aux"):
        if options.get(name) is not None and name not in takes:
            who = "; attention=varlen honours it" if name == "softcap" else ""
            raise ValueError(f"{type(module).__name__} uses {name}, which packed attention here does not honour{who}")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal; packed attention is causal only")
    if options.get("sliding_window") != mask.window:
        raise ValueError(
            f"{type(module).__name__}: its mask is local over {mask.window} tokens and its sliding_window is "
            f"{options.get('sliding_window')}; packed attention knows sliding windows only"
        )


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[L, L] bool, causal and at most `window` wide; None if plain causal says the same."""
    if window is None or length <= window:
        return None
    behind = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (behind >= 0) & (behind < window)
