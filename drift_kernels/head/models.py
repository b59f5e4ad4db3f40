"""Reads the head of a transformers or PEFT causal LM, and checks the reading against the model's own logits.

The configuration proposes and the logits decide. Families write the factor and the cap of their logits under many names, and
some divide by what others multiply with. So every number in the configuration whose name suggests one is a candidate, and the
candidate that reproduces the model's logits for known products is the answer. Duck-typed: nothing here imports transformers.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drift_kernels.head import Head
from drift_kernels.tensors import LoRAHead, is_dtensor

_NAMES = re.compile(r"scal|cap|multipl|temperature|dim_model_base|logit", re.IGNORECASE)
_CLOSE = 2e-2  # relative: bf16 products differ by half of it
_ROWS = 8  # probed positions, each an order of magnitude apart
_verified: weakref.WeakKeyDictionary[Any, _Reading] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Reading:
    """What a model's logits were found to be, and what the finding depends on."""

    softcap: float | None
    logit_scale: float  # between the head's product and a logit
    before: float | None  # factor between the backbone's hidden states and the head's input; None = not a factor
    depends_on: tuple[Any, ...]


def read(model: Any, temperature: float | Tensor = 1.0, *, at_head: bool = False) -> Head:
    """As `Head.of`; with `at_head`, for the head's own input in place of the backbone's hidden states.

    Inside the model's forward, when FSDP has gathered the weight, it needs an earlier check.
    """
    reading, head = verify(model), head_tensors(model)
    scale = reading.logit_scale
    if not at_head:
        if reading.before is None or (reading.before != 1.0 and head.bias is not None):
            raise NotImplementedError(
                f"{type(unwrap_peft(model)).__name__} changes its backbone's hidden states before the head by more than a "
                "factor: that is not supported"
            )
        scale *= reading.before
    return Head(head.weight, head.bias, head.lora, reading.softcap, scale, temperature)


def verify(model: Any) -> _Reading:
    """The softcap and scale of a model's logits, from a check that is repeated only if what it depends on has changed.

    Every rank of a sharded model has to call it at the same time. Raises as `Head.of`.
    """
    base = unwrap_peft(model)
    depends_on = _depends_on(base)
    reading = _verified.get(base)
    if reading is None or reading.depends_on != depends_on:
        if any(p.is_meta for p in base.parameters()):
            raise NotImplementedError(
                f"{type(base).__name__} has parameters on the meta device; load its weights first"
            )
        reading = _read_off(base, depends_on)
        _verified[base] = reading
    return reading


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
    """The module that a causal LM projects with. Raises TypeError without one, NotImplementedError unless it is linear."""
    find = getattr(model, "get_output_embeddings", None)
    module = find() if find is not None else None
    if module is None:
        raise TypeError(f"{type(model).__name__} has no output embeddings: it is no language model with a head")
    if hasattr(module, "modules_to_save"):  # PEFT trains a copy of the whole head
        module = module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapter]
    _lora_of(module)
    layer = getattr(module, "base_layer", module)
    if type(layer).forward is not nn.Linear.forward:
        raise NotImplementedError(
            f"the head is a {type(layer).__name__}, whose forward is not nn.Linear's: its arithmetic is unknown; only a "
            "plain Linear, with or without one LoRA, is supported"
        )
    return module


def head_tensors(model: Any) -> Head:
    """Weight, bias and LoRA of a model's head, without its transform. Raises NotImplementedError for a sharded one."""
    base = unwrap_peft(model)
    module = head_module(base)
    if is_zero3():
        raise NotImplementedError(
            "DeepSpeed ZeRO-3 gathers lm_head only inside its own forward, and backward needs it again; use ZeRO-2 or FSDP2"
        )
    layer = getattr(module, "base_layer", module)
    if is_dtensor(layer.weight):
        raise NotImplementedError(
            "lm_head is sharded where the loss is made: split over tensor-parallel ranks, or by an FSDP2 root that reshards "
            "after its forward (set reshard_after_forward=False, make the loss inside the model's forward, or pass a Head of its "
            "to_local() with parallel=VocabParallel.of(weight) or GatherHidden.of(weight))"
        )
    unpadded = getattr(_text_config(base), "unpadded_vocab_size", None)
    if unpadded is not None and unpadded < layer.weight.shape[0]:
        raise NotImplementedError(
            f"{type(base).__name__} cuts {layer.weight.shape[0]} logits down to unpadded_vocab_size={unpadded}: that is not "
            "supported"
        )
    return Head(layer.weight, getattr(layer, "bias", None), _lora_of(module))


def _lora_of(module: Any) -> LoRAHead | None:
    """The LoRA that PEFT adds to a head. Raises NotImplementedError for anything but one plain adapter without dropout."""
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
            "a bias; leave lm_head out of target_modules, or train all of it (modules_to_save)"
        )
    return LoRAHead(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))


def is_zero3() -> bool:
    """Whether transformers runs under DeepSpeed ZeRO-3, which leaves parameters empty outside their module's forward."""
    module = sys.modules.get("transformers.integrations.deepspeed")
    return module is not None and bool(module.is_deepspeed_zero3_enabled())


def _text_config(model: Any) -> Any:
    find = getattr(model.config, "get_text_config", None)
    return model.config if find is None else find()


def _numbers(model: Any) -> dict[str, float]:
    """The numbers in a model's configuration that may change its logits, by name."""
    config = _text_config(model)
    names = {*vars(config), *(name for name in dir(type(config)) if isinstance(getattr(type(config), name), property))}
    values = {name: getattr(config, name, None) for name in sorted(names) if _NAMES.search(name)}
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value
    }


def _depends_on(model: Any) -> tuple[Any, ...]:
    """What makes an earlier check void when it changes."""
    module = head_module(model)
    layer = getattr(module, "base_layer", module)
    return id(module), id(layer), getattr(layer, "bias", None) is None, tuple(sorted(_numbers(model).items()))


def _candidates(model: Any) -> tuple[list[float], list[float | None]]:
    """Scales and caps that the configuration may mean, the plain ones first."""
    numbers = _numbers(model)
    scales = [1.0]
    for value in numbers.values():
        scales += [value, 1 / value]
    base, width = numbers.get("dim_model_base"), getattr(_text_config(model), "hidden_size", None)
    if base and width:
        scales += [width / base, base / width]  # MiniCPM divides hidden states by their quotient
    caps = [value for name, value in numbers.items() if "cap" in name and value > 0]
    return scales, [None, *caps]


def transformed(products: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Logits in fp32 of the products h·Wᵀ + b, before a temperature."""
    scaled = products.float() * scale
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def _read_off(model: Any, depends_on: tuple[Any, ...]) -> _Reading:
    """The transform that reproduces the model's logits; NotImplementedError if none does."""
    probe = _probe(model)
    scales, caps = _candidates(model)
    before = _factor(probe.head_input, probe.hidden, scales)
    if not _agree(probe.product, probe.own_product):
        raise NotImplementedError(
            f"{type(model).__name__} makes its logits in another way than h·Wᵀ + b with a LoRA: that is not supported"
        )
    if probe.logits.shape == probe.product.shape:
        for cap in caps:
            for scale in scales:
                if _agree(probe.logits, transformed(probe.product, cap, scale)):
                    return _Reading(cap, scale, before, depends_on)
    named = ", ".join(f"{name}={value:g}" for name, value in _numbers(model).items()) or "none"
    raise NotImplementedError(
        f"{type(model).__name__} makes its logits in another way than softcap(scale·(h·Wᵀ + b)) with numbers of its "
        f"configuration ({named}): that is not supported"
    )


@dataclass(frozen=True)
class _Probe:
    """One run of a model on a few tokens, with known rows in the place of its head's input."""

    hidden: Tensor  # the backbone's last hidden states
    head_input: Tensor  # the rows that the model passed to its head
    product: Tensor  # the head's own result for known rows
    own_product: Tensor  # the same by weight, bias and LoRA as read
    logits: Tensor  # the model's logits for the known rows


def _probe(model: Any) -> _Probe:
    seen: dict[str, Any] = {}

    def around(hidden: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        head = head_tensors(model)
        rows = _known_rows(hidden, head.weight)
        seen["head_input"] = hidden.float().cpu()
        product = forward(rows)
        seen["product"], seen["own_product"] = product.float().cpu(), _product(rows, head).float().cpu()
        return product

    ids = torch.arange(_ROWS, device=model.get_input_embeddings().weight.device)[None] % _vocabulary(model)
    # without autocast: it would keep weights cast here, without a gradient, for the training step that surrounds a check
    with _evaluating(model), torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
        with _replaced(head_module(model), around):
            logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return _Probe(hidden=hidden.float().cpu(), logits=logits.float().cpu(), **seen)


def _vocabulary(model: Any) -> int:
    return max(1, int(model.get_input_embeddings().weight.shape[0]))


def _known_rows(hidden: Tensor, weight: Tensor) -> Tensor:
    """Rows of the head input's shape whose products range from about 0.1 to 1,000, so that a cap cannot hide."""
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randn(hidden.shape, generator=drawn).to(weight.device)
    size = weight.float().norm(dim=1).mean().clamp(min=1e-6)
    magnitudes = torch.logspace(-1, 3, rows.shape[-2], device=weight.device)
    return (rows / size * magnitudes[:, None]).to(hidden.dtype)


def _product(rows: Tensor, head: Head) -> Tensor:
    product = nn.functional.linear(rows.to(head.weight), head.weight, head.bias)
    if head.lora is None:
        return product
    return product + head.lora.scale * (rows.to(head.lora.A) @ head.lora.A.t() @ head.lora.B.t())


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results agree row by row, each relative to the largest element of its row."""
    if a.shape != b.shape:
        return False
    size = a.abs().amax(-1, keepdim=True)
    return bool(((a - b).abs() <= _CLOSE * size).all())


def _factor(after: Tensor, before: Tensor, candidates: list[float]) -> float | None:
    """The candidate c with after = c·before, None if there is none."""
    return next((c for c in candidates if _agree(after, before * c)), None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _replaced(module: Any, around: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Iterator[None]:
    """`module.forward(hidden)` is around(hidden, forward) inside; hooks, FSDP's gathering among them, stay in force."""
    own = vars(module).get("forward")
    before = module.forward
    module.forward = lambda hidden: around(hidden, before)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
