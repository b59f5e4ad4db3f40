"""Memory and communication of a training, per rank, from its config and its model's: `python -m bench.scale CONFIG`.

    python -m bench.scale papers/a-qwen2.5-7b --ranks 1 4 8 64 --gpu h100 --set train.shard=fsdp
    python -m bench.scale                       # published models × GPUs, the tables of docs/scale.md
    python -m bench.scale --largest             # the largest of them by GPUs, the table of docs/trainer.md
    python -m bench.scale --papers              # configs/papers, the table of docs/reproduce.md

Computed from shapes, for the rank that holds the most. Tests compare states and collectives with those of real ranks, byte by
byte, and activations with those that autograd saves. Every trajectory is taken to be `train.max_length` tokens long. A GPU
holds what comes to at most `ROOM` of its memory: the rest is for the allocator's gaps, NCCL and CUDA, and is assumed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from bench.shapes import BYTES, PUBLISHED, Shapes, shapes_of
from drift.cli import load_config
from drift.config import Config, parse
from drift.config.algorithms import ALGORITHMS
from drift.training.checkpoint import KEPT

GPUS = {"a100-40": 40e9, "a100-80": 80e9, "h100": 80e9, "h200": 141e9, "b200": 180e9}  # bytes, by their data sheets
ROOM = 0.9  # of a GPU's memory that is counted on
WORKSPACE = 1 << 30  # bytes of the fused loss on a GPU, unless train.workspace_bytes says otherwise
MOST = 1024  # ranks that are looked at
FP32 = 4
RANKS = (1, 2, 4, 8, 64, 1024)
WAYS = {"all, offline": {}, "LoRA, offline": {"lora": True}, "all, online": {"online": True}}  # of `typical`


@dataclass(frozen=True)
class Plan:
    """A training of `config` on so many ranks. All sizes are bytes of one rank."""

    config: Config
    shapes: Shapes
    ranks: int

    @property
    def sharded(self) -> bool:
        return self.config.train.shard == "fsdp" and self.ranks > 1

    @property
    def size(self) -> int:
        """Of an element in the model's type."""
        return BYTES[self.config.model.dtype]

    @property
    def tokens(self) -> int:
        """Of a pack."""
        return self.config.train.max_tokens

    @property
    def batch(self) -> int:
        """Trajectories of a step, over all ranks."""
        online = self.config.online
        return online.prompts * self.config.rollout.n if online else self.config.train.batch_size

    @property
    def packs(self) -> int:
        """A rank's in a step, at most."""
        return math.ceil(math.ceil(self.batch / self.ranks) / (self.tokens // self.config.train.longest))

    @cached_property
    def states(self) -> dict[str, int]:
        """What a rank holds while it trains, between its packs."""
        trained = self.shapes.count(trained=True)
        found = {"weights": self.weights, "masters": self.masters, "gradients": self.gradients, "moments": self.moments}
        if online := self.config.online:
            if ALGORITHMS[online.algorithm].teacher and online.teacher.weights != "policy":
                found["teacher"] = self.moments // 2 if self.sharded else FP32 * trained
            copied = self.moments // 2 if self.sharded else self.copied
            found["reference"] = copied if online.watch.every else 0
            ahead = online.ahead and self.config.engine.kind == "hf"
            found["weights that sample ahead"] = (self.whole if self.sharded else self.copied) if ahead else 0
        return {name: count for name, count in found.items() if count}

    @property
    def copied(self) -> int:
        """A copy of what is trained, in the model's type."""
        return sum(w.numel * w.size * times for w, times in self.shapes.each() if w.trained)

    @property
    def whole(self) -> int:
        """The model as it is sampled from."""
        return sum(w.numel * w.size * times for w, times in self.shapes.each())

    @property
    def weights(self) -> int:
        if not self.sharded:
            return self.whole
        return sum(w.padded(self.ranks) * (FP32 if w.trained else w.size) * n for w, n in self.shapes.each())

    @property
    def masters(self) -> int:
        """Beside weights of another type than float32."""
        if self.sharded:
            return 0
        return sum(FP32 * w.numel * times for w, times in self.shapes.each() if w.trained and w.size < FP32)

    @property
    def gradients(self) -> int:
        """In float32; sharded, they are whole until the last of several packs."""
        return self.gradient_shares if self.packs == 1 else FP32 * self.shapes.count(trained=True)

    @property
    def gradient_shares(self) -> int:
        """Gradients after they met."""
        ranks = self.ranks if self.sharded else 1
        return sum(FP32 * w.padded(ranks) * times for w, times in self.shapes.each() if w.trained)

    @property
    def moments(self) -> int:
        """The two of AdamW."""
        return self.moments_of(0)

    def moments_of(self, rank: int) -> int:
        """Of any rank; shares differ by a row of each parameter."""
        ranks = self.ranks if self.sharded else 1
        own = rank if self.sharded else 0
        return sum(2 * FP32 * w.shard(ranks, own) * times for w, times in self.shapes.each() if w.trained)

    def saved_by_a_layer(self) -> int:
        """Of one token, for the backward pass: two norms, attention and a gated MLP, as transformers writes them.

        A norm saves its input in float32, and its output before and after the scale; rotations save nothing.
        """
        shapes, size = self.shapes, self.size
        norm = shapes.config.hidden_size * (FP32 + 2 * size)
        queries, keys = (heads * shapes.head_width for heads in (shapes.config.num_attention_heads, shapes.keys))
        mlp = 4 * size * shapes.config.intermediate_size
        return 2 * norm + 2 * size * (queries + keys) + mlp

    @property
    def activations(self) -> int:
        """Saved for the backward pass of a pack: of every layer all, or with checkpoints its input; and of the last norm."""
        width = self.shapes.config.hidden_size
        each = width * self.size if self.config.model.gradient_checkpointing else self.saved_by_a_layer()
        return self.tokens * (self.shapes.layers * each + width * (FP32 + self.size))

    @cached_property
    def working(self) -> dict[str, int]:
        """What comes on top within a pack, at the moment that needs the most: the loss, a layer's backward, or the last sum."""
        train, width = self.config.train, self.shapes.config.hidden_size
        layer, root = (sum(w.numel for w in part) for part in (self.shapes.layer, self.shapes.outside))
        trained = [sum(w.numel for w in part if w.trained) for part in (self.shapes.layer, self.shapes.outside)]
        gathered = (root + 2 * layer) * self.size if self.sharded else 0
        hidden = 2 * self.tokens * width * self.size  # and their gradient
        head = self.shapes.head if self.shapes.head_trained else 0
        own = self.masters // FP32 * self.size  # until the masters' take them up
        kept = self.size * head if self.sharded else 0
        at_loss = {
            "activations": self.activations,
            "hidden rows": hidden,
            "loss's workspace": train.workspace_bytes or WORKSPACE,
            "gradient of lm_head": FP32 * head + kept,
        }
        again = 2 * self.tokens * self.saved_by_a_layer()  # a layer's values and their gradients
        in_layer = {
            "activations": self.activations + again,
            "hidden rows": hidden,
            "gradient of lm_head": kept,
            "layer that is reduced": (FP32 + self.size) * trained[0] if self.sharded else 0,
        }
        freed = self.gradients - self.gradient_shares  # of the layers, by then
        at_end = {"embeddings that are reduced": max(0, 2 * FP32 * trained[1] - freed)} if self.sharded else {}
        found = max((at_loss, in_layer, at_end), key=lambda part: sum(part.values()))
        if gathered:
            found = {"layers that are gathered": gathered, **found}
        if own:
            found = {"gradients of a pack": own, **found}
        if self.config.online and ALGORITHMS[self.config.online.algorithm].teacher:
            mixed = self.config.online.teacher.weights == "trust_region"
            found["teacher's head and hidden rows"] = (
                self.size * self.shapes.head * (3 if mixed else 1) + self.packs * self.tokens * width * self.size
            )
        return {name: count for name, count in found.items() if count}

    @property
    def training(self) -> int:
        """The peak while it trains."""
        return sum(self.states.values()) + sum(self.working.values())

    @property
    def before(self) -> int:
        """The peak while the model is spread, a bound: what is whole gives way to shares, a layer, or the rest, at a time."""
        if not self.sharded:
            return self.whole
        units = (sum(w.numel for w in part if w.trained) for part in (self.shapes.layer, self.shapes.outside))
        return max(self.whole, self.weights) + FP32 * max(units)

    @property
    def after(self) -> int:
        """When it is whole again, beside shares and moments; online also whenever it samples, beside the teacher's too."""
        if not self.sharded:
            return self.whole
        kept = sum(self.states.get(name, 0) for name in ("weights", "moments", "teacher", "reference"))
        return self.whole + kept

    @property
    def around(self) -> int:
        """Before and after the training."""
        return max(self.before, self.after)

    @property
    def peak(self) -> int:
        return max(self.training, self.around)

    @property
    def received(self) -> dict[str, int]:
        """In one step, from other ranks, by rings: weights a pack and gradients a step."""
        if self.ranks == 1:
            return {}
        if not self.sharded:
            return {"gradients": round(2 * (self.ranks - 1) / self.ranks * FP32 * self.shapes.count(trained=True))}
        others = self.ranks - 1
        layers = sum(w.padded(self.ranks) * self.shapes.layers for w in self.shapes.layer)
        outside = sum(w.padded(self.ranks) for w in self.shapes.outside)
        shares = sum(w.padded(self.ranks) * times for w, times in self.shapes.each() if w.trained)
        weights = self.packs * others * self.size * (2 * layers + outside)
        return {"weights": weights, "gradients": others * FP32 * shares}

    @property
    def host(self) -> int:
        """Of the first rank's host memory: a checkpoint on its way to the disk, and `drift run`'s copy of the base.

        Shards go to the disk tensor by tensor.
        """
        return self.copied if self.sharded else self.checkpoint + self.copied

    @property
    def checkpoint(self) -> int:
        """On the disk: weights and two moments."""
        return 3 * FP32 * self.shapes.count(trained=True)

    def sampled_beside(self, memory: float) -> int:
        """Sequences of full length whose keys and values fit beside the weights, sampled in process."""
        online = self.config.online
        held = sum(self.states.values()) if online else self.whole
        if online and self.sharded and not online.ahead:
            held += self.whole  # lent for as long as it samples
        a_token = 2 * self.shapes.layers * self.shapes.keys * self.shapes.head_width * self.size
        return max(0, int((memory * ROOM - held) // (a_token * self.config.train.longest)))


def plan(config: Config, ranks: int) -> Plan:
    """Raises ValueError for what does not run on GPUs, and for models whose shape is not known."""
    if config.train.shard_head:
        raise ValueError("train.shard_head runs on CPUs alone, and this is about GPUs; set train.shard_head=false")
    return Plan(config, shapes_of(config.model), ranks)


def smallest(config: Config, shapes: Shapes, memory: float) -> Plan | None:
    """On the fewest GPUs that hold it: 1 to 8, then whole nodes of 8."""
    plans = (Plan(config, shapes, ranks) for ranks in (*range(1, 9), *range(16, MOST + 1, 8)))
    return next((one for one in plans if one.peak <= ROOM * memory), None)


def report(config: Config, ranks: Sequence[int], gpu: str) -> str:
    """The table of one config, with what fits."""
    memory, shapes = GPUS[gpu], plan(config, 1).shapes
    plans = [Plan(config, shapes, number) for number in ranks]
    count, trained = shapes.count(), shapes.count(trained=True)
    part = "" if trained == count else f", {trained / 1e6:,.1f} million trained"
    lines = [
        f"{config.name}: {config.model.path or 'tiny model'}, {count / 1e9:.3f} billion parameters{part}, "
        f"{config.model.dtype}, train.shard={config.train.shard}",
        f"{plans[0].batch} trajectories a step of up to {config.train.longest:,} tokens, packs of {plans[0].tokens:,}",
        "",
        f"| GB of a rank, by ranks | {' | '.join(f'{number:,}' for number in ranks)} |",
        f"|---|{'---:|' * len(ranks)}",
    ]
    names = dict.fromkeys(name for one in plans for name in (*one.states, *one.working))
    for name in names:
        lines.append(_row(name, [one.states.get(name, 0) + one.working.get(name, 0) for one in plans]))
    lines.append(_row("**together, while it trains**", [one.training for one in plans]))
    lines.append(_row("before and after, whole", [one.around for one in plans]))
    lines.append(_row("received in a step", [sum(one.received.values()) for one in plans]))
    lines.append(f"| packs in a step | {' | '.join(f'{one.packs:,}' for one in plans)} |")
    fits = ["yes" if one.peak <= ROOM * memory else f"no, {_gb(one.peak - ROOM * memory)} over" for one in plans]
    lines.append(f"| **fits {gpu}** ({ROOM:.0%} of {_gb(memory)}) | {' | '.join(fits)} |")
    return "\n".join([*lines, "", *_said(config, shapes, gpu)])


def _said(config: Config, shapes: Shapes, gpu: str) -> list[str]:
    memory, found = GPUS[gpu], smallest(config, shapes, GPUS[gpu])
    if found is None:
        least = Plan(config, shapes, MOST)
        held = "before and after training" if least.around > least.training else "while it trains"
        lines = [f"It fits no number of GPUs of kind {gpu}: a rank needs {_gb(least.peak)} {held}. {_remedy(config)}"]
    else:
        lines = [f"The fewest GPUs of kind {gpu} that hold it: {found.ranks} ({_gb(found.peak)} each)."]
    at = found or Plan(config, shapes, 1)
    if config.engine.kind == "hf":
        number = at.sampled_beside(memory)
        lines.append(
            f"Sampling in process: keys and values of {number:,} sequences of {config.train.longest:,} tokens fit beside the "
            f"weights; rollout.batch_size is {config.rollout.batch_size:,}."
        )
    lines.append(
        f"A checkpoint takes {_gb(at.checkpoint)} of disk, and {KEPT} are kept. In the first rank's host memory it takes "
        f"{_gb(at.host)} with the copy of the base; the other ranks' copies take {_gb(at.copied)} each."
    )
    return lines


def _remedy(config: Config) -> str:
    if config.model.lora is not None:
        return "Take a smaller model or a larger GPU."
    if config.train.shard == "none":
        return "Set train.shard=fsdp, or model.lora."
    return "Set model.lora, or take a larger GPU."


def _row(name: str, counts: Iterable[float]) -> str:
    return f"| {name} | {' | '.join(f'{count / 1e9:,.1f}' if count else '' for count in counts)} |"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def typical(path: str, lora: bool = False, online: bool = False) -> Config:
    """A training of a published model as the papers do it, for the tables: bfloat16, checkpoints, packs of 8,704 tokens."""
    model = {"path": path, "dtype": "bfloat16", "gradient_checkpointing": True}
    if lora:
        model["lora"] = {"rank": 64, "alpha": 128}
    return parse({"name": "table", "model": model, "train": {"shard": "fsdp"}, **({"online": {}} if online else {})})


def models() -> str:
    """Published models × GPUs: the fewest that hold the training, and a rank's bytes by the number of ranks."""
    gpus = {"80 GB": GPUS["h100"], "141 GB": GPUS["h200"], "180 GB": GPUS["b200"]}
    heads = [f"{way}, {name}" for way in WAYS for name in gpus]
    lines = [f"| model | parameters | {' | '.join(heads)} |", f"|---|---:|{'---:|' * len(heads)}"]
    ranks = ["", f"| all, offline: GB of a rank (received in a step) | {' | '.join(f'{n:,}' for n in RANKS)} |"]
    ranks.append(f"|---|{'---:|' * len(RANKS)}")
    for path in PUBLISHED:
        cells = []
        for options in WAYS.values():
            config = typical(path, **options)
            shapes = shapes_of(config.model)
            found = [smallest(config, shapes, memory) for memory in gpus.values()]
            cells += [f"{one.ranks}" if one else "–" for one in found]
        config = typical(path)
        shapes = shapes_of(config.model)
        lines.append(f"| {path} | {shapes.count() / 1e9:.2f} B | {' | '.join(cells)} |")
        plans = [Plan(config, shapes, number) for number in RANKS]
        shown = (f"{one.peak / 1e9:,.0f} ({sum(one.received.values()) / 1e9:,.0f})" for one in plans)
        ranks.append(f"| {path} | {' | '.join(shown)} |")
    return "\n".join([*lines, *ranks])


def largest() -> str:
    """The largest published model that so many GPUs hold."""
    lines = [f"| GPUs | {' | '.join(WAYS)} |", f"|---|{'---|' * len(WAYS)}"]
    known = {(path, way): typical(path, **options) for path in PUBLISHED for way, options in WAYS.items()}
    shapes = {key: shapes_of(config.model) for key, config in known.items()}
    for ranks, name in ((1, "a100-40"), (1, "h100"), (4, "h100"), (8, "h100"), (64, "h100"), (1, "h200"), (8, "h200")):
        cells = []
        for way in WAYS:
            plans = {path: Plan(known[path, way], shapes[path, way], ranks) for path in PUBLISHED}
            fits = [path for path, one in plans.items() if one.peak <= ROOM * GPUS[name]]
            cells.append(fits[-1] if fits else "–")
        lines.append(f"| {ranks} × {GPUS[name] / 1e9:.0f} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def papers() -> str:
    """The papers' configs, as published and with the settings of docs/reproduce.md, on 4 and 8 GPUs of 80 GB."""
    lines = ["| config and settings | 4 × 80 GB | 8 × 80 GB | fewest |", "|---|---:|---:|---:|"]
    for name, settings in RECIPES:
        config = load_config(f"papers/{name}", settings)
        shapes, cells = plan(config, 1).shapes, []
        for ranks in (4, 8):
            one = Plan(config, shapes, ranks)
            cells.append(f"{_gb(one.peak)}{'' if one.peak <= ROOM * GPUS['h100'] else ', does not fit'}")
        found = smallest(config, shapes, GPUS["h100"])
        said = f"`{name} {' '.join(settings)}`".replace(" `", "`")
        lines.append(f"| {said} | {' | '.join(cells)} | {found.ranks if found else '–'} |")
    return "\n".join(lines)


ADAPTERS = "model.lora={rank: 64, alpha: 128}"
RECIPES: list[tuple[str, list[str]]] = [  # in the order of docs/reproduce.md
    ("a-qwen2.5-3b", ["train.shard=fsdp"]),
    ("a-qwen2.5-7b", ["train.shard=fsdp"]),
    ("a-llama3.1-8b", ["train.shard=fsdp"]),
    ("b-qwen3-8b-sciknoweval", ["train.shard=fsdp"]),
    ("b-qwen3-8b-sciknoweval", [ADAPTERS]),
    ("b-qwen3-8b-tooluse", ["train.shard=fsdp"]),
    ("b-qwen3-8b-tooluse", [ADAPTERS]),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, computes, prints."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", help="a YAML file, or a shipped config by name; none: published models")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="1 to 1,024")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--set", dest="overrides", metavar="key=value", nargs="+", action="extend", default=[])
    parser.add_argument("--largest", action="store_true", help="the largest published model by GPUs")
    parser.add_argument("--papers", action="store_true", help="the configs in configs/papers")
    options = parser.parse_args(arguments)
    if any(not 1 <= number <= MOST for number in options.ranks):
        parser.error(f"--ranks {options.ranks} must be 1 to {MOST:,}")
    if options.papers or options.largest:
        print(papers() if options.papers else largest())
    elif options.config is None:
        print(models())
    else:
        try:
            print(report(load_config(options.config, options.overrides), options.ranks, options.gpu))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
