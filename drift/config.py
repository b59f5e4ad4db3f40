"""The typed settings of a run: YAML plus dotted overrides (`train.lr=1e-4`).

Every section is a frozen pydantic model that refuses unknown keys, and types are strict: a number in quotes is not a
number. `load` turns every complaint into one `ConfigError` whose lines name the dotted path, the value, and what would
do. YAML is read as YAML, save that 1e-4 is a number (version 1.1 takes it for text), that 1:30 and 010 are not (it takes
them for 90 and 8), and that a key given twice is an error.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from drift.online_config import OnlineConfig
from drift.section import BelowOne, Count, LearningRate, Positive, Rate, Section, Share, Weight, preset

SERVER, FOLDER = r"^https?://[^/]+/?$", r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
PATTERNS = {  # what text that does not fit one should do
    SERVER: "read http://HOST:PORT",
    FOLDER: "be letters, digits, '_', '-' and '.', since it names a folder",
}


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or out of range; one line a complaint."""


class LoRAConfig(Section):
    """Low-rank adapters, by peft."""

    rank: Positive
    alpha: Rate
    dropout: BelowOne = 0.0
    target_modules: str | list[str] = "all-linear"


class ModelConfig(Section):
    """Which model, and how it runs."""

    path: str | None = None  # a local folder or a hub name; null is the embedded tiny model
    hidden_size: Positive = 96  # of the tiny model, as are layers and heads
    layers: Positive = 2
    heads: Positive = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "varlen", "sdpa"] = "auto"
    gradient_checkpointing: bool = False
    lora: LoRAConfig | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.path is None and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} should be a multiple of heads {self.heads}")
        return self


class TaskConfig(Section):
    """Where problems and their verifier come from."""

    kind: Literal["reasoning_gym", "jsonl"] = "reasoning_gym"
    name: str = "chain_sum"  # of the reasoning-gym generator
    options: dict[str, Any] = {}  # the generator's own
    path: str | None = None  # of the JSONL file
    answer_tag: str = "answer"
    seed: Annotated[int, Field(gt=-(2**63), lt=2**63)] = 0  # what torch takes
    warm_problems: Count = 2000
    train_problems: Positive = 192
    eval_problems: Positive = 1000

    @model_validator(mode="after")
    def _path_fits_kind(self) -> TaskConfig:
        if self.kind == "jsonl" and self.path is None:
            raise ValueError("path should name the JSONL file, since kind is jsonl")
        if self.kind != "jsonl" and self.path is not None:
            raise ValueError(f"path is {self.path!r}, which only kind jsonl reads; set kind=jsonl, or leave path out")
        return self


class WarmStartConfig(Section):
    """Supervised training of the tiny model up to a target, not for a number of steps."""

    enabled: bool = True  # false where model.path names a model, which is taken as it is
    target_low: Share = 0.30  # share of problems solved within rollout.turns sampled turns
    target_high: Share = 0.50
    max_steps: Positive = 2000
    check_every: Positive = 25
    check_problems: Positive = 200
    batch_size: Positive = 64
    lr: LearningRate = 2e-3
    wrong_share: BelowOne = 0.35  # share of the demonstrated answers that are wrong, so that retrying is learnt
    taught_share: BelowOne = 0.0  # share of dialogues that begin with a correct solution, so that reading one is learnt
    tool_share: BelowOne = 0.0  # share of dialogues that let rollout.tool work out the problem's expression

    @model_validator(mode="after")
    def _low_below_high(self) -> WarmStartConfig:
        if self.target_low >= self.target_high:
            raise ValueError(f"target_low {self.target_low} should be below target_high {self.target_high}")
        return self


class EngineConfig(Section):
    """What samples: the policy in process, or a vLLM server (docs/engines.md)."""

    kind: Literal["hf", "vllm"] = "hf"
    url: Annotated[str, Field(pattern=SERVER)] = "http://127.0.0.1:8000"  # of the server
    concurrency: Positive = 64  # requests in flight
    timeout: Rate = 600.0  # seconds for the answer to one request
    retries: Count = 5  # of a request that was put off, cut off, or not answered in time
    wait: Rate = 600.0  # seconds for a server that was reached before and is not now, such as while it restarts
    folder: str | None = None  # for weights on their way, seen by both sides; null is the system's temporary one
    tolerance: Rate | None = None  # nats between server and policy after a handover; null is 1e-3, or 0.1 in bfloat16


class RolloutConfig(Section):
    """How trajectories are sampled (A1)."""

    n: Positive = 16  # trajectories a prompt
    turns: Positive = 5
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 512
    feedback: Literal["simple", "full"] = "simple"
    history: Literal["keep", "template"] = "keep"
    batch_size: Positive = 512
    format_penalty: Annotated[float, Field(le=0)] = -0.1  # a turn whose answer cannot be parsed
    tool: Literal["calculator"] | None = None  # that the model may call between its answers
    tool_calls: Positive = 8  # in one trajectory


class WeightsConfig(Section):
    """Returns and importance weights (A2, A3)."""

    beta: Rate = 0.1
    gamma: Share = 0.9
    repetition: Weight = 0.5
    skip_unsolved_groups: bool = False
    min_weight: Weight = 0.0
    off_policy: Literal["refuse", "correct"] = "refuse"  # rows that another policy sampled, by `drift train` (A1)
    off_policy_clip: Rate = 5.0  # nats, of a trajectory's log π_ref − log μ


EXACT = {"turns": "assistant", "token_reduction": "sum", "normalize": "weights"}


class TrainConfig(Section):
    """Weighted supervised training (A4, A5)."""

    lr: LearningRate = 5e-6
    warmup_ratio: Share = 0.1
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: Weight = 0.1
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.999)
    grad_clip: Rate = 1.0
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    batch_size: Positive = 128  # trajectories an optimizer step, over all ranks
    max_tokens: Annotated[int, Field(ge=2)] = 8192  # a pack, which is a micro-batch
    max_length: Annotated[int, Field(ge=2)] = 8704  # a trajectory: its oldest prompt turns are cut to fit
    turns: Literal["last", "assistant"] = "last"
    normalize: Literal["samples", "weights"] = "samples"
    token_reduction: Literal["mean", "sum"] = "mean"
    preset: Literal["exact"] | None = None  # exact: the maximum-likelihood fit, sets the three above
    rounds: Positive = 1
    save_every: Count = 0  # optimizer steps; 0 saves at the end alone
    workspace_bytes: Positive | None = None  # of the fused loss; null is the backend's own default
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _resolve_preset(cls, data: Any) -> Any:
        named = isinstance(data, dict) and data.get("preset") == "exact"
        return preset(data, "preset exact", EXACT) if named else data

    @property
    def longest(self) -> int:
        """Tokens of a trajectory at most: what does not fit into a pack is cut to fit."""
        return min(self.max_length, self.max_tokens)


class EvalConfig(Section):
    """Greedy multi-turn evaluation (A6)."""

    turns: Positive = 5
    samples: Count = 0  # one-turn samples a problem at temperature 1, for mean@n and pass@n; 0 draws none
    max_new_tokens: Positive = 1024
    batch_size: Positive = 512


class TrackConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = []
    progress: bool = True


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=FOLDER)]  # of the run's folder in output_dir
    output_dir: str = "runs"
    seeds: Annotated[list[Count], Field(min_length=1)] = [0]
    arms: Annotated[list[Literal["uniform", "success_only", "drift"]], Field(min_length=1)] = [
        "uniform",
        "success_only",
        "drift",
    ]  # of the offline method
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    weights: WeightsConfig = WeightsConfig()
    train: TrainConfig = TrainConfig()
    online: OnlineConfig | None = None  # where it is there, the online method runs in place of the offline one
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()

    @property
    def trained(self) -> list[str]:
        """What is trained from the base, by name: the arms, or the online algorithm."""
        return [self.online.algorithm] if self.online else list(self.arms)

    @model_validator(mode="after")
    def _tool_to_show(self) -> Config:
        if self.warm_start.tool_share and self.rollout.tool is None:
            raise ValueError(
                f"warm_start.tool_share {self.warm_start.tool_share} shows a tool, and rollout.tool names none"
            )
        return self

    @model_validator(mode="after")
    def _server_cuts_nothing(self) -> Config:
        if self.engine.kind == "vllm" and self.rollout.top_p != 1:
            raise ValueError(
                f"rollout.top_p {self.rollout.top_p} with engine.kind 'vllm': a server's log-probs are those after the cut, and "
                "training needs those before it; set rollout.top_p=1.0, or engine.kind=hf"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _warm_start_is_for_the_tiny_model(cls, data: Any) -> Any:
        model, warm_start = (
            (data.get(key, {}) for key in ("model", "warm_start")) if isinstance(data, dict) else ((), ())
        )
        if not isinstance(model, dict) or not isinstance(warm_start, dict) or model.get("path") is None:
            return data
        if warm_start.get("enabled") is True:
            raise ValueError(
                f"warm_start.enabled is true and model.path {model['path']!r}, but only the embedded tiny model is warm-"
                "started; leave one of them out"
            )
        return {**data, "warm_start": {"enabled": False, **warm_start}}

    @model_validator(mode="after")
    def _no_repeats(self) -> Config:
        for key, values in (("seeds", self.seeds), ("arms", self.arms)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key} {values} should not name one twice")
        return self


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=value` overrides (values are YAML), and checks the whole.

    Raises ConfigError, one line a complaint; OSError where the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as that") from None
    raw = _parse(text, str(path))
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: {raw!r} is not a mapping; write `name: …` and the sections, one a line")
    for override in overrides:
        _apply(raw, override)
    return parse(raw)


def parse(raw: dict[str, Any]) -> Config:
    """Checks a plain mapping, as YAML gives it. Raises ConfigError."""
    complaints = [_unknown(path) for path in _unknown_paths(Config, raw, ())]
    if complaints:
        raise ConfigError("\n".join(complaints))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(map(_ill_typed, error.errors()))) from None


def dump(config: Config) -> str:
    """The YAML that `load` reads back as the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# --- YAML ---


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def _plain_number(self, node: yaml.ScalarNode) -> float:
        """Not what only YAML 1.1 takes for a number: 1:30 for 90, to the base of 60, and 010 for 8."""
        digits = node.value.lstrip("+-").replace("_", "")
        if ":" in digits or re.fullmatch(r"0[0-9]+", digits):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} is no decimal number; write it as one, or in quotes where it is text",
                problem_mark=node.start_mark,
            )
        integer = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader._plain_number)


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):  # 1e-4, 1E5: numbers in YAML 1.2, text in 1.1
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # the last four of odd keys
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r} should read section.key=value, such as train.lr=1e-4")
    section = raw
    for depth, key in enumerate(keys[:-1], 1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:depth])} is {section!r}, which has no keys")
    section[keys[-1]] = _parse(text, f"override {override!r}")


# --- complaints ---


def _section_of(annotation: Any) -> type[Section] | None:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _unknown_paths(model: type[Section], raw: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths in `raw` that the model has no field for, down to the keys under an unknown section."""
    if not isinstance(raw, dict):
        return
    for key, value in raw.items():
        path = (*prefix, str(key))
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            yield from ((*path, str(below)) for below in value) if isinstance(value, dict) and value else (path,)
        elif section := _section_of(field.annotation):
            yield from _unknown_paths(section, value, path)


def _known_paths(model: type[Section], prefix: str = "") -> Iterator[str]:
    for key, field in model.model_fields.items():
        yield prefix + key
        if section := _section_of(field.annotation):
            yield from _known_paths(section, f"{prefix}{key}.")


def _unknown(path: tuple[str, ...]) -> str:
    """Names what is spelt much alike at the same depth, else the same key elsewhere, else all that the section knows."""
    dotted, known = ".".join(path), list(_known_paths(Config))
    near = difflib.get_close_matches(dotted, [other for other in known if other.count(".") == len(path) - 1], 1, 0.8)
    near = near or [other for other in known if other.split(".")[-1] == path[-1]]
    if near:
        return f"{dotted}: no such setting; did you mean {' or '.join(near)}?"
    prefix = dotted.removesuffix(path[-1])
    keys = [other for other in known if other.startswith(prefix) and "." not in other.removeprefix(prefix)]
    if not keys:  # an unknown section
        return f"{dotted}: no such setting; did you mean {difflib.get_close_matches(dotted, known, 1, 0.0)[0]}?"
    there = ", ".join(key.removeprefix(prefix) for key in keys)
    return f"{dotted}: no such setting; {prefix.removesuffix('.') or 'the file'} knows {there}"


def _ill_typed(error: Any) -> str:
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error["loc"]).lstrip(".")
    where = f"{path}: " if path else ""
    match error["type"]:
        case "missing":
            return f"{where}is missing; add it to the file, or give {path}=…"
        case "value_error":
            return f"{where}{error['ctx']['error']}"
        case "string_pattern_mismatch":
            return f"{where}{error['input']!r} should {PATTERNS[error['ctx']['pattern']]}"
        case "model_type" | "model_attributes_type":
            return f"{where}{error['input']!r} should be a mapping of keys to values, or left out"
        case "too_short":
            return f"{where}{error['input']!r} should have at least {error['ctx']['min_length']} item"
        case _:
            or_null = " or null" if _nullable(error["loc"]) else ""
            return f"{where}{error['input']!r} {error['msg'].removeprefix('Input ')}{or_null}"


def _nullable(loc: tuple[str | int, ...]) -> bool:
    annotation: Any = Config
    for key in loc:
        section = _section_of(annotation)
        if section is None or key not in section.model_fields:
            return False
        annotation = section.model_fields[str(key)].annotation
    return type(None) in typing.get_args(annotation)
