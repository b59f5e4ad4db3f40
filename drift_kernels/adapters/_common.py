"""What adapters share: the trainer's version, the head of a causal LM, and what happens between its product and a logit."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import drift_kernels as dk
from drift_kernels.head.models import head_module, read, unwrap_peft, verify
from drift_kernels.packs import check_batch

not_compiled: Any = torch.compiler.disable  # a decorator; heads are swapped while a model runs


@dataclass(frozen=True)
class Support:
    """The versions of a package that an adapter was written for: minimum ≤ version < below."""

    package: str
    minimum: str
    below: str

    def __str__(self) -> str:
        return f"{self.package} >= {self.minimum}, < {self.below}"

    @property
    def pip(self) -> str:
        """The command that installs a supported version."""
        return f'pip install "{self.package}>={self.minimum},<{self.below}"'

    def check(self) -> str:
        """The installed version. Raises ImportError naming the pip command if there is none that is supported."""
        try:
            installed = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"this adapter needs {self}: {self.pip}") from None
        from packaging.version import Version  # comes with every trainer there is an adapter for

        # a development version of a release counts as that release: its seam is looked at anyway
        if not Version(self.minimum) <= Version(Version(installed).base_version) < Version(self.below):
            raise ImportError(f"{self.package} {installed} is not supported; this adapter needs {self}: {self.pip}")
        return installed

    def seam(self, module: str, name: str) -> Any:
        """The attribute `name` of `module`, which an adapter replaces; RuntimeError if this version lacks it."""
        version = self.check()
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"{self.package} {version} has no {module}.{name} ({error}), which this adapter replaces; it needs {self}"
            ) from error


Inside = Callable[[Tensor, dk.Head], Any]  # (hidden [B, L, D], head) → anything


@not_compiled
def inside_head(model: Any, hidden: Tensor, fn: Inside, *, at_head: bool = False) -> Any:
    """fn(hidden, head) in place of the head's forward: FSDP's hooks gather the weight and reduce its gradient there.

    at_head  `hidden` is the head's own input, not the backbone's hidden states
    """
    module = head_module(unwrap_peft(model))
    before = vars(module).get("forward")

    def forward(hidden: Tensor) -> Any:
        head = read(model, at_head=at_head)
        return fn(hidden.to(head.weight.device), head)

    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


_NOT_FOR_A_BACKBONE = ("labels", "shift_labels", "num_items_in_batch")  # PEFT hands on every argument it has


def wrap_forward(model: nn.Module, around: Callable[..., Any]) -> None:
    """`model.forward(…)` becomes around(model, before, …), `before` being what it was; its signature stays.

    On the instance, since PEFT calls `forward` without hooks; bound to it, so that a copy of the model calls itself.
    """
    bound = model.forward
    before = getattr(bound, "__func__", None) or (lambda _, *args, **kwargs: bound(*args, **kwargs))

    @functools.wraps(before)  # generate() reads the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, functools.partial(before, self), *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def verify_if_loaded(model: Any, *, at_head: bool = False) -> None:
    """Checks `Head.of(model)` now, unless parameters are still empty; the first forward checks it then."""
    head_module(unwrap_peft(model))
    if not any(p.is_meta or p.numel() == 0 for p in model.parameters()):
        read(model, at_head=at_head)


def run_inside_forward(model: Any) -> None:
    """Teaches `model` the keyword `drift_inside=fn`: its forward then runs the backbone and returns fn(hidden, head).

    A pack whose sequences the model mixes raises PackingError.
    Inside the forward, since that is what DDP, FSDP and autocast wrap; without the keyword nothing changes, so that
    `generate` and evaluation find the model as it was. Raises NotImplementedError for a model whose logits come about in
    another way.
    """
    verify_if_loaded(model)

    def around(self: Any, before: Any, *args: Any, drift_inside: Inside | None = None, **kwargs: Any) -> Any:
        if drift_inside is None:
            return before(*args, **kwargs)
        verify(self)  # again if the configuration or the head has changed since
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_A_BACKBONE}
        check_batch(self, kwargs)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        return inside_head(self, hidden, drift_inside)

    wrap_forward(model, around)


@dataclass(frozen=True)
class WeightedCollator:
    """A collator's batch with `token_weights` [its labels' shape], from one weight a token or one an example.

    inner         makes everything else; its batch must have "labels", padded [B, L] or flattened [1, T]
    token_column  a list as long as "input_ids"; None or absent = 1
    example_column  a number; None or absent = 1; the two are multiplied
    shares        adds `token_shares`, 1 / the number of labels of the token's example that count
    required      whether one row at least of every batch has one of the two columns
    """

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]
    token_column: str | None = "token_weights"
    example_column: str | None = "weight"
    shares: bool = False
    required: bool = True

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The inner batch and ours; raises ValueError if weights are missing, or not as many as their tokens."""
        own = (self.token_column, self.example_column)
        if self.required and not any(column in example for column in own for example in examples):
            raise ValueError(
                f"no row has {' or '.join(repr(column) for column in own if column)}, but {sorted(examples[0])}: Trainer drops "
                "columns that a model does not take, unless remove_unused_columns=False; required=False takes rows without"
            )
        rows = [self._weights(example) for example in examples]
        batch = self.inner([{k: v for k, v in example.items() if k not in own} for example in examples])
        batch["token_weights"] = _laid_out(rows, batch)
        if self.shares:
            batch["token_shares"] = _laid_out([_share(example) for example in examples], batch)
        return batch

    def _weights(self, example: dict[str, Any]) -> Tensor:
        length = len(example["input_ids"])
        weights = torch.ones(length)
        if self.token_column in example:
            weights = torch.as_tensor(example[self.token_column], dtype=torch.float32)
            if weights.shape != (length,):
                raise ValueError(
                    f"{self.token_column} has shape {tuple(weights.shape)} for {length} tokens; one a token"
                )
        if self.example_column in example:
            weights = weights * float(example[self.example_column])
        if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
            raise ValueError(f"weights {weights.tolist()[:8]} must be finite and at least 0")
        return weights


def _share(example: dict[str, Any]) -> Tensor:
    """1 / its labels that count, for each of an example's tokens; the first is nobody's target."""
    labels = torch.as_tensor(example.get("labels", example["input_ids"]))
    return torch.full(labels.shape, 1.0 / max(int((labels[1:] != -100).sum()), 1))


def _laid_out(rows: list[Tensor], batch: dict[str, Any]) -> Tensor:
    """Rows of per-token numbers as the labels of `batch` lie: padded [B, L] on either side, or flattened [1, T]."""
    labels = batch["labels"]
    out = torch.zeros(labels.shape, dtype=torch.float32)
    total = sum(map(len, rows))
    if labels.shape[0] == len(rows) and labels.shape[1] >= max(map(len, rows)):
        left = "attention_mask" in batch and bool((batch["attention_mask"][:, :1] == 0).any())
        for i, row in enumerate(rows):
            out[i, slice(labels.shape[1] - len(row), None) if left else slice(len(row))] = row
    elif labels.shape[0] == 1 and labels.shape[1] >= total:
        out[0, :total] = torch.cat(rows)
    else:
        raise ValueError(f"labels {tuple(labels.shape)} are neither {len(rows)} padded rows nor one flattened row")
    return out


# --- prefix trees under any trainer: a batch stays as the trainer made it, and so does all that is made of hidden states ---


@dataclass
class Sharing:
    """Counts of a model under `share_prefixes`."""

    tokens: int = 0  # of the batches, without padding
    rows: int = 0  # that went through the backbone

    @property
    def saved(self) -> float:
        """The share of the tokens that did not go through the backbone."""
        return 1 - self.rows / self.tokens if self.tokens else 0.0


def share_prefixes(model: Any) -> Sharing:
    """From here on the backbone of `model` (a causal LM, or a PeftModel around one) runs batches of several rows as trees.

    That is, whenever it keeps no cache: in training, and in scoring passes with use_cache=False. Tokens that rows have in
    common at their beginning are computed once, forward and backward; padding is not computed. `generate` and single rows run
    as before. Call it before DDP and torch.compile. Again for the same model it returns the same counts.
    Raises ValueError for a model that mixes tokens by more than attention, or has dropout; ImportError without `drift`.
    """
    causal_lm = unwrap_peft(model)
    backbone = causal_lm.base_model
    if "_drift_sharing" in vars(backbone):
        return backbone._drift_sharing
    try:
        layout, attention, packing = map(
            importlib.import_module, ("drift.training.layout", "drift.model.attention", "drift.packing")
        )
    except ImportError as error:
        raise ImportError(
            f"prefix trees need drift's trainer ({error}): install this package with its extra 'train'"
        ) from error
    before = causal_lm.config._attn_implementation
    first = next(causal_lm.parameters())
    causal_lm.set_attn_implementation(attention.register(device=first.device, dtype=first.dtype))
    reason = layout.unsuited(_Tried(causal_lm, attention))
    if reason is not None:
        causal_lm.set_attn_implementation(before)
        raise ValueError(f"{reason}: its batches cannot be prefix trees; leave tree=False")
    sharing = backbone._drift_sharing = Sharing()

    def around(self: Any, before: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        keeps = kwargs.get("use_cache")
        cached = keeps or kwargs.get("past_key_values") is not None or (keeps is None and not self.training)
        if cached or args or input_ids is None or len(input_ids) == 1:
            return before(input_ids, *args, **kwargs)
        mask = _mask(input_ids, kwargs)
        tree = packing.prefixes([row[kept].numpy() for row, kept in zip(input_ids.cpu(), mask.cpu())])
        sharing.tokens += len(tree.rows)
        sharing.rows += len(tree.input_ids)
        device = input_ids.device
        kwargs |= {"position_ids": tree.position_ids[None].to(device), "attention_mask": None, "use_cache": False}
        with attention.tree(tree.starts, tree.parents, len(tree.input_ids)):
            out = before(tree.input_ids[None].to(device), **kwargs)
        rows = torch.zeros(mask.shape, dtype=torch.int64, device=device)
        rows[mask] = tree.rows.to(device)
        out.last_hidden_state = out.last_hidden_state[0][rows]
        return out

    wrap_forward(backbone, around)
    return sharing


def _mask(input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Which tokens are no padding, [B, L] bool; ValueError for an argument that a tree has no place for."""
    mask = kwargs.get("attention_mask")
    known = ("attention_mask", "position_ids")
    others = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.dim() and name not in known]
    others += [
        name for name in ("output_hidden_states", "output_attentions", "output_router_logits") if kwargs.get(name)
    ]
    if others or (mask is not None and mask.dim() != 2):
        named = ", ".join(others) or f"attention_mask of shape {tuple(mask.shape)}"  # pyright: ignore[reportOptionalMemberAccess]
        raise ValueError(f"prefix trees take input_ids and an attention_mask [B, L], not {named}; leave tree=False")
    return torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()


@dataclass
class _Tried:
    """A causal LM as `drift.training.layout.unsuited` runs it."""

    model: nn.Module
    attention: Any

    def hidden(self, batch: Any) -> Tensor:
        backbone: Any = self.model.base_model
        with self.attention.layout(batch):
            out = backbone(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                attention_mask=None,
                use_cache=False,
            )
        return out.last_hidden_state[0]
