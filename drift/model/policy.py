"""The model that is trained and sampled: load it, run its backbone over a pack, hand out its head, save it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import drift_kernels
from drift import files
from drift.config import LoRAConfig, ModelConfig
from drift.model import hollow, smollm2, tiny
from drift.model.attention import layout, register
from drift.model.borders import backbone, needs_borders, run_alone, run_packed
from drift.model.sandbox import set_defaults
from drift.model.turns import Turns
from drift.types import PackedBatch, TreeBatch

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy:
    """A transformers causal LM (or a peft wrapper of one) with its tokenizer.

    model      as transformers or peft made it; `model.generate` works
    tokenizer  with a chat template
    packed     whether several trajectories run in one pass; False: one after the other
    source     the files of a model that is hollow (`drift.model.hollow`): it can be spread over ranks, and nothing else
    """

    source: hollow.Weights | None = None

    def __init__(self, model: Any, tokenizer: Any, *, packed: bool = True) -> None:
        self.model, self.tokenizer, self.packed = model, tokenizer, packed
        self._borders: bool | None = None  # not measured yet
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use a model tuned for chat"
            )

    @property
    def turns(self) -> Turns:
        """What the chat template writes around messages."""
        return Turns.of(self.tokenizer)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an assistant's turn: the one that the template writes, and those that the model's files name."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        named = {i for i in (*ends, self.tokenizer.eos_token_id) if i is not None}
        return frozenset({*named, self.turns.closer})

    @property
    def causal_lm(self) -> Any:
        """The causal LM itself, below a peft wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    def hidden(self, batch: PackedBatch | TreeBatch) -> torch.Tensor:
        """The backbone's hidden states after the final norm [T, D]; trajectories of the pack do not see each other.

        Of a `TreeBatch` they are those of its rows, [R, D].
        Raises PackingError at the first pack of several segments if the model mixes them (`check_packing`).
        """
        if isinstance(batch, TreeBatch):
            return self._tree(batch)
        pack = (batch.input_ids, batch.position_ids, batch.cu_seqlens)
        if len(batch.cu_seqlens) == 2:
            return run_packed(self.causal_lm, *pack, borders=False)
        if not self.packed:
            return run_alone(self.causal_lm, *pack)
        return run_packed(self.causal_lm, *pack, borders=self.check_packing())

    def check_packing(self) -> bool:
        """Whether layers take the borders of a pack as arguments; measured once. Raises PackingError if a pack leaks."""
        if self._borders is None:
            self._borders = self.packed and needs_borders(self.causal_lm)
        return self._borders

    def _tree(self, batch: TreeBatch) -> torch.Tensor:
        if not self.packed or self.check_packing():
            reason = "has layers that take the borders of a pack" if self.packed else "runs alone (model.packed=false)"
            raise ValueError(f"{type(self.causal_lm).__name__} {reason}, and trees have none; set train.tree=off")
        ids, positions = batch.input_ids[None], batch.position_ids[None]
        with layout(batch):
            hidden = backbone(
                self.causal_lm, input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False
            )
        return hidden[0]

    def head(self, temperature: float | torch.Tensor = 1.0) -> drift_kernels.Head:
        """lm_head as the ops take it, tied or not, LoRA included; temperature: one number, or one a row [T]."""
        return drift_kernels.Head.of(self.model, temperature)

    def state(self, device: str | torch.device | None = None) -> dict[str, torch.Tensor]:
        """A copy of every parameter that is trained, by name; on `device`, by default where the parameter is."""
        trained = ((name, p.detach()) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name: p.to(device or p.device, copy=True) for name, p in trained}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Puts back what `state` gave."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if trained.keys() != state.keys():
            raise ValueError(
                f"state: its parameters are not this policy's: {sorted(trained.keys() ^ state.keys())[:3]}"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state[name])

    def named_weights(self, trained: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, or those that are trained, whole, in order of names; if spread over ranks, every rank calls this."""
        for name, parameter in sorted(self.model.named_parameters(), key=lambda pair: pair[0]):
            if parameter.requires_grad or not trained:
                yield name, parameter.detach()

    def hash(self) -> str:
        """Sixteen hex digits that change with any weight; if it is spread over ranks, every rank calls this."""
        digest = hashlib.sha256()
        for name, parameter in self.named_weights():
            digest.update(name.encode())
            values: Any = parameter.to("cpu").contiguous().view(torch.uint8).numpy()
            digest.update(values)
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Weights (safetensors; adapters alone for LoRA), config and tokenizer, as `load_policy` and transformers read them.

        With a manifest of checksums, which `load_policy` compares the weights with. Raises WriteError.
        """
        with files.into(folder) as partial:
            self.model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inside, the model is in eval mode and records no gradients."""
        with evaluating(self.model), torch.inference_mode():
            yield


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; after it, in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def load_policy(
    config: ModelConfig, *, device: str | torch.device = "cpu", seed: int = 0, empty: bool = False
) -> Policy:
    """The policy that `config.path` names (a local folder or a hub name), or the embedded tiny one with weights from `seed`.

    New adapters follow from `seed` too. With `empty` a folder's weights stay on the disk (`Policy.source`). Raises
    ValueError if attention cannot run as asked, if the tokenizer has no chat template, for files that cannot be
    read or differ from their manifest, and for weights that are not finite.
    """
    dtype, weights = DTYPES[config.dtype], None
    attention = register(config.attention, device=device, dtype=dtype)
    if config.path is None:
        tokenizer = tiny.build_tokenizer()
        model: Any = tiny.build_model(config, tokenizer, seed, attention)
        for parameter in model.parameters():  # buffers stay in float32, as they are when transformers reads a model
            parameter.data = parameter.data.to(dtype)
    else:
        if config.path == smollm2.NAME and not Path(config.path).is_dir():
            config = config.model_copy(update={"path": str(smollm2.folder())})
        assert config.path is not None
        path, adapters = _adapters(config.path)
        if not Path(path).is_dir() and not _HUB_NAME.fullmatch(path):
            raise ValueError(
                f"model.path={path!r} is neither a folder that is there nor a hub name, NAME or OWNER/NAME"
            )
        _check_files(config.path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.path, trust_remote_code=False)
            options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
            if empty:
                model, weights = hollow.build(path, dtype, attention)
            else:
                model = AutoModelForCausalLM.from_pretrained(path, **options)
        except OSError as error:
            if Path(path).is_dir():
                raise
            raise ValueError(
                f"model.path={path!r} is not a folder here, and the hub does not give it: {str(error).splitlines()[0]}"
            ) from error
        except (ValueError, SafetensorError, UnpicklingError, EOFError) as error:  # also of JSON that is cut off
            raise ValueError(
                f"the model at {config.path!r} cannot be read ({error}); have it written again, or name another"
            ) from error
        if adapters:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, config.path, is_trainable=True, trust_remote_code=False)
        if weights is None:
            _check_finite(model, config.path)
    if config.lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _with_lora(model, config.lora)
    model.to(device)
    if config.gradient_checkpointing:
        # gradient_checkpointing_enable before transformers 5.24
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    policy = Policy(model, tokenizer, packed=config.packed)
    set_defaults(tokenizer, config.chat_template_kwargs)
    _ = policy.eos_ids  # a template without an end of turns is refused now
    policy.source = weights
    if weights is None:
        policy.head()  # checked now: a model whose logits cannot be reproduced is refused before anything runs
    return policy


def _check_files(path: str) -> None:
    """Raises ValueError if the weights in a folder that `Policy.save` wrote are not those that it wrote."""
    if not (Path(path) / files.MANIFEST).is_file():
        return
    if damage := files.damage(path, ".safetensors"):
        raise ValueError(
            f"the model at {path!r} is damaged: {damage}; have it written again, or name another (if the change is "
            f"meant, remove {Path(path) / files.MANIFEST})"
        )


def _check_finite(model: torch.nn.Module, path: str) -> None:
    """Raises ValueError for weights with NaN or infinity, which would be evaluated as a model that knows nothing."""
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            raise ValueError(
                f"the model at {path!r} is damaged: {bad} of the {parameter.numel()} values of {name} are NaN or infinite; "
                "take another copy of it, or an earlier checkpoint"
            )


def _adapters(path: str) -> tuple[str, bool]:
    """(where the base model is, whether `path` holds adapters of it)."""
    found = Path(path) / "adapter_config.json"
    if found.is_file():
        return json.loads(found.read_text())["base_model_name_or_path"], True
    return path, False


def _with_lora(model: Any, config: LoRAConfig) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("model.lora needs peft: pip install peft") from error
    targets = config.target_modules
    shape: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    return get_peft_model(model, LoraConfig(**shape, target_modules=targets, task_type="CAUSAL_LM"))
