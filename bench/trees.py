"""`python -m bench.trees`: a whole training step with shared prefixes computed once, against the same step without.

A case is a group of conversations of five turns. A step packs them, runs forward, backward, clipping and AdamW. The ways
take turns in one process, so a ratio pairs times taken within seconds of each other; the process's own time on its
processors is noted too, since it bears a busy machine. The recipe is transformers' `Trainer`
with micro-batches of two rows padded to the longer one and logits of every position, as the offline method was published.
Nobody is timed whose first gradient differs. Peak memory is that of a fresh process.

With `--folder` the rows are the first batch that a run trained on, with the run's own model and settings.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from torch import Tensor

from bench import memory
from bench.report import RESULTS, machine, progress, versions
from drift import config, packing, returns, store
from drift.config import TrainConfig
from drift.jobs import stages
from drift.model import attention, tiny
from drift.model.policy import Policy, load_policy
from drift.training import layout, trainer
from drift.training.meter import Stopwatch
from drift.training.optimizer import MasterAdamW
from drift.types import Trajectory, Turn

WAYS = ("shared", "unshared", "recipe")
CLOCKS = ("step_time", "step_cpu_time")  # by the wall, and of the process on its processors
TURNS = 5
FULL = 16  # siblings of the groups that the aims are for
TOLERANCE = 1e-4  # of the gradient of a parameter, in units of its largest entry


@dataclass(frozen=True)
class Shape:
    """The model, and the tokens of a turn; a quarter of them is the environment's, the others are trained."""

    t: int = 16
    V: int = 8192
    D: int = 384
    layers: int = 6


SMALL = Shape(t=4, V=515, D=32, layers=2)


@dataclass(frozen=True)
class Case:
    """How a group shares, and how much of the unshared step's time is aimed at."""

    title: str
    prompt: int = 2  # tokens, in turns
    samples: str = "keep"  # "template": each turn is a sample of its own, with all that came before
    branches: int = 0  # siblings that share their first three turns, in so many families
    apart: bool = False  # each sibling has its own prompt
    reach: float | None = None  # None: 1.25 times the tokens' share


CASES = {
    "template": Case("`history: template`", samples="template", reach=0.33),
    "long": Case("`keep`, prompt of five turns", prompt=5, reach=0.65),
    "short": Case("`keep`, short prompt", reach=0.85),
    "branches": Case("branches after the third turn", branches=4),
    "apart": Case("nothing shared", apart=True, reach=1.02),
}
ROOM = TrainConfig().max_tokens  # of a pack, by default


def group(case: Case, n: int, shape: Shape) -> list[Trajectory]:
    """n siblings: their samples as trajectories."""
    numbers = torch.Generator().manual_seed(1)

    def drawn(turns: int) -> list[int]:
        return torch.randint(3, shape.V, (turns * shape.t,), generator=numbers).tolist()

    prompt, rows = drawn(case.prompt), []
    families = [drawn(3) for _ in range(case.branches)]
    for sibling in range(n):
        begin = [3 + sibling, *drawn(case.prompt)[1:]] if case.apart else prompt
        past = families[sibling * case.branches // n] if families else drawn(3)
        rows.append([*begin, *past, *drawn(TURNS - 3)])
    turns = []
    for start in range(case.prompt * shape.t, len(rows[0]), shape.t):
        turns.append(Turn(start + shape.t // 4, start + shape.t))
    if case.samples == "keep":
        return [Trajectory("p", ids, turns, index=i) for i, ids in enumerate(rows)]
    samples = [(ids[: turn.stop], turn) for ids in rows for turn in turns]
    return [Trajectory("p", ids, [turn], index=i) for i, (ids, turn) in enumerate(samples)]


def model(shape: Shape, implementation: str) -> Any:
    """A Qwen3, always with the same weights; its head is to its layers as in Qwen3-0.6B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.V, hidden_size=shape.D, intermediate_size=3 * shape.D, num_hidden_layers=shape.layers,
        num_attention_heads=max(2, shape.D // 64), num_key_value_heads=max(1, shape.D // 128), head_dim=min(64, shape.D),
        max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.05, attn_implementation=implementation,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


# --- the ways: each call is a step, and returns its seconds ---


class Ours:
    """drift's trainer over rows, laid out as `settings.tree` says."""

    def __init__(self, policy: Policy, rows: Sequence[Trajectory], settings: TrainConfig) -> None:
        self.policy, self.rows, self.config = policy, rows, settings
        self.optimizer = MasterAdamW(policy.model, settings)
        policy.model.train()
        self.tokens = 0

    def packs(self) -> Sequence[layout.Batch]:
        """The rows, laid out."""
        chosen = self.config
        return layout.packs(self.policy, self.rows, chosen, turns=chosen.turns, token_reduction=chosen.token_reduction)

    def gradient(self) -> dict[str, Tensor]:
        """By name, of the mean over samples; the weights stay."""
        packs = self.packs()
        self.tokens = sum(len(pack.input_ids) for pack in packs)
        trainer.accumulate(self.policy, packs, self.optimizer, float(len(self.rows)), self.config)
        found = {name: m.grad.clone() for name, m in self.optimizer.masters.items() if m.grad is not None}
        self.optimizer.zero()
        return found

    def step(self) -> dict[str, float]:
        """What a `Stopwatch` reads."""
        watch = Stopwatch()
        trainer.train_step(self.policy, self.packs(), self.optimizer, float(len(self.rows)), self.config)
        return watch.read()


class Recipe:
    """transformers' `Trainer`: weight × mean cross-entropy of a row, two rows at a time, padded, all logits."""

    def __init__(self, case: Case, n: int, shape: Shape) -> None:
        self.rows, self.model = group(case, n, shape), model(shape, "sdpa")
        self.tokens, self.first = 0, {}

    def gradient(self) -> dict[str, Tensor]:
        """As of the others."""
        self.step(learning_rate=0.0)
        return self.first

    def step(self, learning_rate: float = 1e-5) -> dict[str, float]:
        """What a `Stopwatch` reads from the beginning of the trainer's step to its end."""
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        found: dict[str, float] = {}
        self.tokens = 0

        def batch(rows: list[Trajectory]) -> dict[str, Tensor]:
            longest = max(len(row.token_ids) for row in rows)
            ids, mask, labels = (torch.full((len(rows), longest), fill) for fill in (0, 0, -100))
            for i, row in enumerate(rows):
                ids[i, : len(row.token_ids)], mask[i, : len(row.token_ids)] = torch.tensor(row.token_ids), 1
                for turn in row.turns:
                    labels[i, turn.start : turn.stop] = ids[i, turn.start : turn.stop]
            self.tokens += ids.numel()
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        class Weighted(Trainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
                labels = inputs["labels"][:, 1:]
                losses = torch.nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2).float(), labels, reduction="none"
                )
                return (losses.sum(1) / (labels != -100).sum(1)).mean()

        recipe = self

        class Watch(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                self.watch = Stopwatch()

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if not recipe.first:  # before clipping
                    recipe.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                found.update(self.watch.read())

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, max_steps=1, per_device_train_batch_size=2, learning_rate=learning_rate, max_grad_norm=0.0,
                gradient_accumulation_steps=len(self.rows) // 2, report_to="none", save_strategy="no", use_cpu=True,
                logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            )  # fmt: skip
            made: Any = Weighted(self.model, arguments, train_dataset=self.rows, data_collator=batch)  # type: ignore[arg-type]
            made.model_accepts_loss_kwargs = False  # the mean over micro-batches
            made.add_callback(Watch())
            made.remove_callback(PrinterCallback)
            made.train()
        return found


TREE = {"shared": "auto", "unshared": "off"}  # `train.tree` of a way


def make(way: str, case: Case, n: int, shape: Shape, max_tokens: int) -> Ours | Recipe:
    """One of `WAYS`."""
    if way == "recipe":
        return Recipe(case, n, shape)
    settings = TrainConfig(tree=TREE[way], turns="assistant", max_tokens=max_tokens, max_length=max_tokens, lr=1e-5)  # type: ignore[arg-type]
    policy = Policy(model(shape, attention.register("sdpa")), tiny.build_tokenizer())
    return Ours(policy, group(case, n, shape), settings)


def of_run(way: str, folder: Path) -> Ours:
    """`shared` or `unshared`, over the first batch that the offline run in `folder` trained on."""
    chosen = config.load(folder / "config.yaml")
    policy, rows = load_policy(chosen.model, seed=0), store.read(folder / "rollouts.jsonl")
    weights, _ = returns.weigh_for_training(rows, chosen.weights)
    trajectories = stages.weighted(chosen, policy, rows, weights)
    batch = trainer._batch(len(trajectories), chosen.train.batch_size, chosen.seeds[0], 0)
    settings = chosen.train.model_copy(update={"tree": TREE[way]})
    return Ours(policy, [trajectories[i] for i in batch], settings)


def difference(found: dict[str, Tensor], want: dict[str, Tensor]) -> str:
    """What is wrong with a gradient; empty if nothing is."""
    if found.keys() != want.keys():
        return f"gradients of {sorted(found.keys() ^ want.keys())[:3]} on one side only"
    for name, plain in want.items():
        off = float((found[name] - plain).abs().max() / plain.abs().max().clamp(min=1e-9))
        if not off <= TOLERANCE:
            return f"the gradient of {name} differs by {off:.1e}"
    return ""


# --- a case ---


def peak(way: str, name: str, n: int, shape: Shape, max_tokens: int) -> int:
    """Bytes by which a step raises what is resident, in this process."""
    one = make(way, CASES[name], n, shape, max_tokens)
    small = make(way, CASES[name], 2, SMALL, ROOM)  # libraries and threads are up
    small.step()
    if isinstance(one, Ours):
        layout.unsuited(one.policy)
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    memory.RESET.write_text("5")
    before = memory.high_water()
    one.step()
    return memory.high_water() - before


def alone(way: str, name: str, n: int, shape: Shape, max_tokens: int) -> int:
    """`peak` in a fresh process. RuntimeError with its last words if it dies."""
    request = json.dumps([way, name, n, asdict(shape), max_tokens])
    command = [sys.executable, "-m", "bench.trees", "--run", request]
    done = subprocess.run(command, capture_output=True, text=True, cwd=memory.ROOT, env=os.environ | memory.ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:200])
    return int(done.stdout.split()[-1])


def measure(
    name: str, n: int, runs: dict[str, Ours | Recipe], rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """A case as plain data. RuntimeError if a way's gradient differs from that of `unshared`."""
    say(f"{name}, n = {n}: gradients")
    want = runs["unshared"].gradient()
    for way, run in runs.items():
        if wrong := difference(run.gradient(), want):
            raise RuntimeError(f"{name}, {way}: {wrong}")
    del want
    ways = list(runs)
    times: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            say(f"{name}, n = {n}, round {number}: {way}")
            gc.collect()
            times[way].append(runs[way].step())
    tokens = {way: run.tokens for way, run in runs.items()}
    share = tokens["shared"] / tokens["unshared"]
    found: dict[str, Any] = {"name": name, "n": n, "tokens": tokens, "times": times, "bytes": {}, "share": share}
    found |= {"reach": reach(name, share) if n == FULL else None, "best": {}, "ratio": {}, "paired": {}}
    for clock in CLOCKS:
        read = {way: [seconds[clock] for seconds in rounds] for way, rounds in times.items()}
        best = {way: min(seconds) for way, seconds in read.items()}
        found["best"][clock] = best
        found["ratio"][clock] = best["shared"] / best["unshared"]
        found["paired"][clock] = statistics.median(a / b for a, b in zip(read["shared"], read["unshared"]))
    return found


def reach(name: str, share: float) -> float | None:
    """Which ratio of steps a case aims at."""
    if name not in CASES:
        return None
    aim = CASES[name].reach
    return 1.25 * share if aim is None else aim


def packing_speed(shape: Shape) -> dict[str, float]:
    """Tokens that each layout packs in a second of the process's own time, from trajectories to tensors."""
    rows = group(CASES["template"], 64, shape)
    tokens, found = sum(len(row.token_ids) for row in rows), {}
    for name in ("tree", "pack"):
        seconds = []
        for _ in range(5):
            start = time.process_time()
            getattr(packing, name)(rows, ROOM, turns="assistant")
            seconds.append(time.process_time() - start)
        found[name] = tokens / min(seconds)
    return found


def markdown(results: dict[str, Any]) -> str:
    """Machine, versions, and the table."""
    where, shape = results["machine"], Shape(**results["shape"])
    described = (
        f"Qwen3 with D {shape.D}, {shape.layers} layers, V {shape.V:,}, fp32; {TURNS} turns of {shape.t} tokens, "
    )
    described += f"{shape.t - shape.t // 4} of them trained"
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in results["versions"].items())
    out = [
        f"{where['cpu']} ({', '.join(where['isa']) or where['torch_isa']}), {where['threads']} threads, {results['date']}. "
        f"{packages}. Python {where['python']}.",
        "",
        f"{results['folder'] or described}; AdamW; packs of at most {results['max_tokens']:,} tokens.",
        "",
        f"Layout, of own time: trees {results['packing']['tree'] / 1e6:.1f} and flat packs "
        f"{results['packing']['pack'] / 1e6:.1f} million tokens a second.",
        "",
        "A ratio of steps is that of the best, with the median over pairs; the second one is of the process's own time on its "
        "processors, which bears a busy machine. Seconds and MiB are those of shared, unshared, recipe.",
        "",
        "| case | n | tokens, shared ÷ unshared | aim | step, by the wall | step, own time | seconds by the wall | own seconds "
        "| recipe ÷ shared, own time | recipe's tokens | a step adds, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        tokens = case["tokens"]
        seconds = [", ".join(f"{case['best'][clock][way]:.2f}" for way in WAYS if way in tokens) for clock in CLOCKS]
        ratios = [f"{case['ratio'][clock]:.2f} ({case['paired'][clock]:.2f})" for clock in CLOCKS]
        own = case["best"]["step_cpu_time"]
        cells = [
            CASES[case["name"]].title if case["name"] in CASES else case["name"],
            str(case["n"]),
            f"{tokens['shared']:,} ÷ {tokens['unshared']:,} = {case['share']:.2f}",
            "–" if case["reach"] is None else f"≤ {case['reach']:.2f}",
            *ratios,
            *seconds,
            f"{own['recipe'] / own['shared']:.1f}" if "recipe" in own else "–",
            f"{tokens['recipe']:,}" if "recipe" in tokens else "–",
            ", ".join(f"{case['bytes'][way] / 2**20:,.0f}" for way in WAYS if way in case["bytes"]) or "–",
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, ""])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes trees.md and trees.json (trees-smoke.* with --smoke), and returns what the JSON holds."""
    parser = argparse.ArgumentParser(prog="python -m bench.trees", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which (default all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="which (default all)")
    parser.add_argument(
        "--n", nargs="+", type=int, default=[4, 8, 16, 64], help="siblings of a group (default 4 8 16 64)"
    )
    parser.add_argument(
        "--full", nargs="*", type=int, default=[FULL], help="of those, with recipe and memory (default 16)"
    )
    parser.add_argument("--folder", type=Path, help="in place of the cases: of an offline run, whose batch is stepped")
    parser.add_argument("--tokens", type=int, default=Shape.t, help=f"of a turn (default {Shape.t})")
    parser.add_argument("--max-tokens", type=int, default=ROOM, help=f"of a pack (default {ROOM})")
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed steps of each way at n = 16, others as long (default 3)"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it work at all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default bench/results)")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one process's part
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    if args.run:
        way, name, n, shape, room = json.loads(args.run)
        print(peak(way, name, n, Shape(**shape), room))
        return {}
    if not {"shared", "unshared"} <= set(args.ways):
        parser.error("--ways must name shared and unshared: the table is their ratio")
    shape = SMALL if args.smoke else Shape(t=args.tokens)
    results: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions(["transformers", "accelerate"]),
        "shape": asdict(shape),
        "folder": None,
        "max_tokens": args.max_tokens,
        "packing": packing_speed(shape),
        "cases": [],
    }
    stem = args.out / ("trees-smoke" if args.smoke else "trees")
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = memory.available() is None and not args.no_memory
    jobs = [(name, n) for name in args.cases for n in args.n]
    if args.folder is not None:
        stem, jobs = stem.with_name(f"{stem.name}-{args.folder.name}"), [(args.folder.name, 0)]
        chosen = config.load(args.folder / "config.yaml")
        results |= {"folder": f"a batch of {chosen.train.batch_size} rows of {chosen.model.path}"}
        results |= {"max_tokens": chosen.train.max_tokens}
    with progress(len(jobs)) as (say, advance):
        for name, n in jobs:
            if args.folder is not None:
                runs: dict[str, Ours | Recipe] = {way: of_run(way, args.folder) for way in TREE}
                found = measure(name, len(runs["shared"].rows), runs, args.rounds, say)
            else:
                ways = [way for way in WAYS if way in args.ways and (way in TREE or n in args.full)]
                runs = {way: make(way, CASES[name], n, shape, args.max_tokens) for way in ways}
                found = measure(name, n, runs, max(1, args.rounds * FULL // n), say)
                runs.clear()
                for way in ways if sizes and n in args.full else ():
                    say(f"{name}, n = {n}, memory: {way}")
                    found["bytes"][way] = alone(way, name, n, shape, args.max_tokens)
            results["cases"].append(found)
            stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            stem.with_suffix(".md").write_text(markdown(results))
            advance()
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
