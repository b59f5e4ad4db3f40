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
from torch.distributed.tensor import DTensor

import drift_kernels as dk
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
        """The installed version. Raises ImportError naming the pip command where there is none that is supported."""
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"this adapter needs {self}: {self.pip}") from None
        from packaging.version import Version  # comes with every trainer there is an adapter for

        # a development version of a release counts as that release: its seam is looked at anyway
        if not Version(self.minimum) <= Version(Version(found).base_version) < Version(self.below):
            raise ImportError(f"{self.package} {found} is not supported; this adapter needs {self}: {self.pip}")
        return found

    def seam(self, module: str, name: str) -> Any:
        """The attribute `name` of `module`, which an adapter replaces; RuntimeError where this version lacks it."""
        found = self.check()
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"{self.package} {found} has no {module}.{name} ({error}), which this adapter replaces; it needs {self}"
            ) from error


@dataclass(frozen=True)
class Head:
    """A model's output projection, as the ops take it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora: dk.LoRAHead | None
    softcap: float | None
    logit_scale: float

    def options(self) -> dict[str, Any]:
        """The keyword arguments of an op that say how a logit comes of hidden and weight."""
        lora = {} if self.lora is None else {"lora": self.lora}
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale} | lora


def transform_of(config: Any) -> tuple[float | None, float]:
    """(softcap, logit_scale) of a transformers config: what a model does to the product of its head.

    Families write the factor under different names, and Granite and MiniCPM3 divide by theirs.
    """
    text = config.get_text_config()
    scale: float = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            scale = float(getattr(text, name))
            break
    else:
        divisor = getattr(text, "logits_scaling", None)
        if divisor is not None:
            scale = float(divisor) if text.model_type == "hyperclovax" else 1 / float(divisor)
    return getattr(text, "final_logit_softcapping", None), scale


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself. Raises NotImplementedError for prompt learning."""
    if not hasattr(model, "get_base_model"):
        return model
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise NotImplementedError(
            f"{type(config).__name__} puts virtual tokens before the prompt, so that hidden states and labels no longer "
            "align; use LoRA, or leave the trainer's own loss on"
        )
    return model.get_base_model()


def head_module(model: Any) -> Any:
    """The module that a causal LM projects with; TypeError for a model without one, NotImplementedError unless it is linear."""
    module = model.get_output_embeddings()
    if module is None:
        raise TypeError(f"{type(model).__name__} has no output embeddings: it is no language model with a head")
    if hasattr(module, "modules_to_save"):  # PEFT trains a copy of the whole head
        module = module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapter]
    _lora_of(module)
    layer = getattr(module, "base_layer", module)
    if type(layer).forward is not nn.Linear.forward:
        raise NotImplementedError(
            f"the head is a {type(layer).__name__}, whose forward is not nn.Linear's: what it does beside weight and bias is not "
            "known, and not supported"
        )
    return module


def _lora_of(module: Any) -> dk.LoRAHead | None:
    """What PEFT adds to a head; NotImplementedError for anything but one plain LoRA adapter without dropout."""
    if not hasattr(module, "base_layer") or module.disable_adapters or module.merged:
        return None
    names = module.active_adapters
    name = names[0] if names else ""
    dropout = getattr(module, "lora_dropout", {})
    plain = (
        len(names) == 1
        and name in getattr(module, "lora_A", {})
        and not getattr(module, "use_dora", {}).get(name)
        and not getattr(module, "lora_variant", {}).get(name)
        and getattr(module.lora_B[name], "bias", None) is None
        and (name not in dropout or not getattr(dropout[name], "p", 0.0))
    )
    if not plain:
        raise NotImplementedError(
            f"the PEFT adapter {', '.join(names)} on lm_head is not supported: only one plain LoRA, without dropout, DoRA or "
            "a bias of its own; leave lm_head out of target_modules, or train all of it (modules_to_save)"
        )
    return dk.LoRAHead(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))


def head_of(model: Any) -> Head:
    """What the ops need of a causal LM's head. To be called inside its forward (`inside_head`), where FSDP has gathered it."""
    module = head_module(model)
    if zero3_enabled():
        raise NotImplementedError(
            "DeepSpeed ZeRO-3 gathers lm_head only inside its own forward, and backward needs it again; use ZeRO-2 or FSDP2"
        )
    layer = getattr(module, "base_layer", module)
    if isinstance(layer.weight, DTensor):
        raise NotImplementedError(
            "lm_head is sharded where the loss is made: split over tensor-parallel ranks, or by an FSDP2 root that reshards "
            "after its forward while compute_loss_func comes after that; neither is supported (reshard_after_forward=False, "
            "or apply(model) alone)"
        )
    unpadded = getattr(model.config.get_text_config(), "unpadded_vocab_size", None)
    if unpadded is not None and unpadded < layer.weight.shape[0]:
        raise NotImplementedError(
            f"{type(model).__name__} cuts {layer.weight.shape[0]} logits down to unpadded_vocab_size={unpadded}: that is not "
            "supported"
        )
    return Head(layer.weight, getattr(layer, "bias", None), _lora_of(module), *transform_of(model.config))


def transformed(products: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Logits of products in fp32: what `transform_of` names, done to them."""
    scaled = products.float() * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


Inside = Callable[[Tensor, Head], Any]  # (hidden [B, L, D], head) → anything


@not_compiled
def inside_head(model: Any, hidden: Tensor, fn: Inside) -> Any:
    """fn(hidden, head) in the place of the head's forward: FSDP's hooks gather the weight and reduce its gradient there."""
    module = head_module(model)
    before = vars(module).get("forward")

    def forward(hidden: Tensor) -> Any:
        head = head_of(model)
        return fn(hidden.to(head.weight.device), head)

    module.forward = forward
    try:
        return module(hidden)
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def zero3_enabled() -> bool:
    """Whether transformers runs under DeepSpeed ZeRO-3, where parameters outside their module's forward are empty."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


_NOT_FOR_A_BACKBONE = ("labels", "shift_labels", "num_items_in_batch")  # PEFT hands on every argument it has


def wrap_forward(model: nn.Module, around: Callable[..., Any]) -> None:
    """`model.forward(…)` becomes around(model, before, …), `before` being what it was; its signature stays.

    On the instance, since PEFT calls `forward` without hooks; bound to it, so that a copy of the model calls itself.
    """
    found = model.forward
    before = getattr(found, "__func__", None) or (lambda _, *args, **kwargs: found(*args, **kwargs))

    @functools.wraps(before)  # generate() reads the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, functools.partial(before, self), *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def run_inside_forward(model: Any) -> None:
    """Teaches `model` the keyword `drift_inside=fn`: its forward then runs the backbone and returns fn(hidden, head).

    A pack whose sequences the model mixes raises PackingError.
    Inside the forward, since that is what DDP, FSDP and autocast wrap; without the keyword nothing changes, so that
    `generate` and evaluation find the model as it was. Raises NotImplementedError for a model whose logits come about in
    another way.
    """
    _check_logits(model)

    def around(self: Any, before: Any, *args: Any, drift_inside: Inside | None = None, **kwargs: Any) -> Any:
        if drift_inside is None:
            return before(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_A_BACKBONE}
        check_batch(self, kwargs)
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        return inside_head(self, hidden, drift_inside)

    wrap_forward(model, around)


def _check_logits(model: Any) -> None:
    """Whether a model's logits, of four tokens, are what `Head` makes of its backbone's last hidden states."""
    head_module(model)
    if zero3_enabled() or any(p.is_meta for p in model.parameters()):
        return  # nothing is there to look at
    modes = {module: module.training for module in model.modules()}
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    try:
        with torch.no_grad():
            model.eval()
            expected = model(input_ids=ids, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head = head_of(model)
            hidden = hidden.to(head.weight)
            found = nn.functional.linear(hidden, head.weight, head.bias)
            if head.lora is not None:
                found = found + head.lora.scale * (hidden.to(head.lora.A) @ head.lora.A.t() @ head.lora.B.t())
            found = transformed(found, head.softcap, head.logit_scale).to(expected.device)
    finally:
        for module, training in modes.items():
            module.training = training
    if found.shape != expected.shape or (found - expected).abs().max() > 2e-2 * expected.abs().max():
        raise NotImplementedError(
            f"{type(model).__name__} makes its logits in another way than its head, softcap {head.softcap} and scale "
            f"{head.logit_scale} of its config do from its backbone's hidden states: that is not supported; transformers' "
            "Trainer with drift_kernels.adapters.transformers.apply may be"
        )


def shifted(values: Tensor, fill: float) -> Tensor:
    """`values` [..., L] moved one place to the left, so that place i holds what row i predicts; `fill` at the end."""
    out = torch.full_like(values, fill)
    out[..., :-1] = values[..., 1:]
    return out


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
        """The inner batch and ours; raises ValueError where weights are missing, or not as many as their tokens."""
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
