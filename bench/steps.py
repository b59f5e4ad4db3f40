"""`python -m bench.steps`: a whole optimizer step of the trainers themselves, with drift and without: time and peak memory.

A step is what lies between a trainer's `on_step_begin` and `on_step_end`: forward, backward, clipping, AdamW. Each run is a
process of its own, in which a real trainer's `train()` goes a few steps over a small model with a large vocabulary. Who
does not give the losses and first gradients of the trainer without drift is listed without a time. For GRPO the completions
are made up, since generating them is no part of a loss.
"""

from __future__ import annotations

import argparse
import contextlib
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from bench import memory
from bench.cases import log_probs
from bench.measure import paired
from bench.report import RESULTS, machine, progress, versions

PLAIN = "without"
TOLERANCE = 2e-4  # of losses, and of each parameter's gradient in units of its largest entry


@dataclass(frozen=True)
class Shape:
    """The model and a step's batch of `rows` sequences; the end of each, `trained` tokens, is trained."""

    rows: int = 16
    length: int = 128
    trained: int = 64
    V: int = 32_768
    D: int = 256
    layers: int = 2


SMALL = Shape(rows=8, length=16, trained=8, V=515, D=32)


@dataclass
class Entry:
    """A trainer in one of its ways."""

    name: str
    status: str = "ok"  # or "unavailable", "failed" (an error, or other losses or gradients than without)
    reason: str = ""
    times: dict[int, float] = field(default_factory=dict)  # by round, seconds: the median of a process's steps
    added_bytes: int | None = None  # by which a step raises what is resident
    peak_bytes: int | None = None  # of the whole process

    def fail(self, reason: str, status: str = "failed") -> None:
        """No numbers for this one."""
        self.status, self.reason, self.times, self.added_bytes, self.peak_bytes = status, reason, {}, None, None


# --- inside a process: a trainer, and what is noted of its steps ---


def _model(shape: Shape) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.V, hidden_size=shape.D, intermediate_size=2 * shape.D, num_hidden_layers=shape.layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05, max_position_embeddings=shape.length,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def _tokenizer() -> Any:
    """A trainer wants one; nothing here is text but a prompt that GRPO's dataset has to have."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _settings(shape: Shape, steps: int, folder: str) -> dict[str, Any]:
    return dict(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=shape.rows, learning_rate=1e-4, adam_epsilon=1e-4,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False,
        dataloader_pin_memory=False, remove_unused_columns=False, lr_scheduler_type="constant",
    )  # fmt: skip


def _rows(shape: Shape, steps: int, weighted: bool = False) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(steps * shape.rows):
        ids = torch.randint(3, shape.V, (shape.length,), generator=g).tolist()
        prompt = shape.length - shape.trained
        row = {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}
        made.append(row | {"weight": 1.0} if weighted else row)
    return made


def _sft(way: str, shape: Shape, steps: int, folder: str) -> Any:
    import trl
    from datasets import Dataset

    from drift_kernels.adapters.trl import DriftSFTTrainer

    kind: Any = trl.SFTTrainer
    more: dict[str, Any] = {}
    if way == "DriftSFTTrainer":
        kind, more = DriftSFTTrainer, {"normalize": "tokens"}
    data = Dataset.from_list(_rows(shape, steps, weighted=bool(more)))
    args = trl.SFTConfig(**_settings(shape, steps, folder), max_length=None)
    return kind(_model(shape), args, train_dataset=data, processing_class=_tokenizer(), **more)


def _grpo(way: str, shape: Shape, steps: int, folder: str) -> Any:
    import trl
    from datasets import Dataset

    from drift_kernels.adapters.trl import DriftGRPOTrainer

    args = trl.GRPOConfig(
        **_settings(shape, steps, folder), num_generations=4, max_completion_length=shape.trained, beta=0.0
    )
    kind: Any = DriftGRPOTrainer if way == "DriftGRPOTrainer" else trl.GRPOTrainer
    data = Dataset.from_dict({"prompt": ["<unk>"] * shape.rows * steps})
    model = _model(shape)
    batch = _completions(model, shape)
    trainer = kind(model, lambda completions, **_: [0.0], args, train_dataset=data, processing_class=_tokenizer())
    trainer._prepare_inputs = lambda generation_batch: batch
    return trainer


def _completions(model: Any, shape: Shape) -> dict[str, torch.Tensor]:
    """As GRPOTrainer hands on what it has sampled and scored: groups of four, of which one in four has equal rewards."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, shape.V, (shape.rows, shape.length), generator=g)
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.flatten(0, 1)
    everyone = torch.arange(ids.numel())
    own = log_probs(hidden, model.lm_head.weight.detach(), targets.flatten().clamp(min=0), everyone)
    own = own.view_as(ids)[:, shape.length - shape.trained - 1 : -1]
    advantages = torch.randn(shape.rows, generator=g)
    advantages[torch.arange(shape.rows) // 4 % 4 == 0] = 0
    prompt, completion = ids.split([shape.length - shape.trained, shape.trained], 1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": advantages,
        "old_per_token_logps": own + 0.08 * torch.randn(own.shape, generator=g),
        "num_items_in_batch": torch.tensor(float(completion.numel())),
    }


def _trainer(way: str, shape: Shape, steps: int, folder: str) -> Any:
    from transformers import Trainer, TrainingArguments, default_data_collator

    model: Any = _model(shape)
    if way == "apply(model)":
        from drift_kernels.adapters import transformers as fused

        fused.apply(model)
    data: Any = _rows(shape, steps)
    args = TrainingArguments(**_settings(shape, steps, folder))
    return Trainer(model, args, train_dataset=data, data_collator=default_data_collator)


@dataclass(frozen=True)
class Case:
    """A trainer, how one is made, and its ways: without drift first."""

    title: str
    package: str
    make: Callable[[str, Shape, int, str], Any]
    ways: tuple[str, ...]


CASES = {
    "trainer": Case("transformers Trainer", "accelerate", _trainer, (PLAIN, "apply(model)")),
    "sft": Case("TRL SFTTrainer", "trl", _sft, (PLAIN, "enable()", "DriftSFTTrainer")),
    "grpo": Case("TRL GRPOTrainer", "trl", _grpo, (PLAIN, "enable()", "DriftGRPOTrainer")),
}


def run(case: str, way: str, steps: int, shape: Shape, sizes: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """(seconds, losses, and with `sizes` bytes, of `steps` steps after a first one; that one's gradients by name)."""
    from transformers import TrainerCallback

    found: dict[str, Any] = {"seconds": []}
    gradients: dict[str, torch.Tensor] = {}
    began = resident = 0.0

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal began, resident
            gc.collect()
            if sizes:
                if sys.platform == "linux":
                    ctypes.CDLL(None).malloc_trim(0)
                memory.RESET.write_text("5")
                resident = memory.high_water()
            began = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if not gradients:
                gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                return
            found["seconds"].append(time.perf_counter() - began)
            if sizes:
                peak = memory.high_water()
                found["peak"] = max(found.get("peak", 0), peak)
                found["added"] = max(found.get("added", 0), peak - resident)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if way == "enable()":
            from drift_kernels.adapters import trl as fused

            stack.enter_context(fused.enable())
        trainer = CASES[case].make(way, shape, steps + 1, folder)
        trainer.add_callback(Watch())
        torch.manual_seed(2)
        trainer.train()
        found["losses"] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return found, gradients


# --- outside: processes in turn, the gate, the report ---


def alone(case: str, way: str, steps: int, shape: Shape, sizes: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """`run` in a fresh process. RuntimeError with its last words where it dies."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.pt"
        request = json.dumps([case, way, steps, asdict(shape), sizes])
        command = [sys.executable, "-m", "bench.steps", "--run", request, "--out", str(out)]
        environment = os.environ | (memory.ENVIRONMENT if sizes else {})
        done = subprocess.run(command, capture_output=True, text=True, cwd=memory.ROOT, env=environment)
        if not out.exists():
            words = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(words[-1][:200] if words else f"exit status {done.returncode}")
        return torch.load(out)


def differences(found: tuple[dict, dict], plain: tuple[dict, dict]) -> str:
    """What is wrong with losses or gradients; empty if they agree."""
    (numbers, gradients), (numbers_plain, gradients_plain) = found, plain
    losses, expected = numbers["losses"], numbers_plain["losses"]
    if len(losses) != len(expected):
        return f"{len(losses)} losses, not {len(expected)}"
    for loss, want in zip(losses, expected):
        if not abs(loss - want) <= TOLERANCE * max(1.0, abs(want)):
            return f"losses differ: {loss:.6f}, not {want:.6f}"
    if gradients.keys() != gradients_plain.keys():
        return f"gradients of {sorted(gradients.keys() ^ gradients_plain.keys())} on one side only"
    for name, want in gradients_plain.items():
        off = float((gradients[name] - want).abs().max() / want.abs().max().clamp(min=1e-9))
        if not off <= TOLERANCE:
            return f"the gradient of {name} differs by {off:.1e}"
    return ""


Runner = Callable[[str, str, int, Shape, bool], tuple[dict[str, Any], dict[str, Any]]]


def measure(
    name: str, shape: Shape, rounds: int, steps: int, sizes: bool, say: Callable[[str], None], runner: Runner = alone
) -> dict[str, Any]:
    """A case's entries as plain data: processes take turns, `rounds` each for time and one for memory."""
    case = CASES[name]
    entries = [Entry(way) for way in case.ways]
    plain: tuple[dict, dict] | None = None
    for turn in range(rounds + sizes):
        for entry in entries if turn % 2 == 0 else [entries[0], *entries[:0:-1]]:
            if entry.status != "ok":
                continue
            of_memory = turn == rounds
            say(f"{name}, {entry.name}: {'memory' if of_memory else f'round {turn}'}")
            try:
                found = runner(name, entry.name, 2 if of_memory else steps, shape, of_memory)
            except (RuntimeError, ImportError) as error:
                missing = "No module named" in str(error) or isinstance(error, ImportError)
                entry.fail(str(error), "unavailable" if missing else "failed")
                continue
            if entry.name == PLAIN and not of_memory:
                plain = found
            elif not of_memory and (
                wrong := differences(found, plain) if plain else f"nothing {PLAIN} to compare with"
            ):
                entry.fail(f"wrong: {wrong}")
                continue
            if of_memory:
                entry.added_bytes, entry.peak_bytes = found[0]["added"], found[0]["peak"]
            else:
                entry.times[turn] = statistics.median(found[0]["seconds"])
    first = entries[0].times
    rows = [
        {**asdict(entry), "seconds": min(entry.times.values(), default=None), "faster": paired(first, entry.times)}
        for entry in entries
    ]
    return {"name": name, "title": case.title, "shape": asdict(shape), "entries": rows}


def markdown(results: dict[str, Any]) -> str:
    """Machine, versions, and a table a trainer."""
    where = results["machine"]
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in results["versions"].items())
    out = [
        f"{where['cpu']} ({', '.join(where['isa']) or where['torch_isa']}), {where['threads']} threads, {results['date']}. "
        f"{found}. Python {where['python']}.",
        "",
    ]
    for case in results["cases"]:
        shape = Shape(**case["shape"])
        out += [
            f"### {case['title']}",
            f"{shape.rows} rows of {shape.length} tokens, {shape.trained} of them trained; D {shape.D}, {shape.layers} layers, "
            f"V {shape.V:,}, fp32, AdamW.",
            "",
            "| | seconds a step | without ÷ with | a step adds, MiB | process peak, MiB |",
            "|---|---|---|---|---|",
        ]
        for entry in case["entries"]:
            if entry["status"] != "ok":
                out.append(f"| {entry['name']} | {entry['status']}: {entry['reason']} | – | – | – |")
                continue
            cells = [f"{entry['seconds']:.3f}" if entry["seconds"] else "–"]
            cells.append("–" if entry["name"] == PLAIN or entry["faster"] is None else f"{entry['faster']:.2f}")
            cells += [
                "–" if entry[key] is None else f"{entry[key] / 2**20:,.0f}" for key in ("added_bytes", "peak_bytes")
            ]
            out.append("| " + " | ".join([entry["name"], *cells]) + " |")
        out.append("")
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints, writes steps.md and steps.json (steps-smoke.* with --smoke), and returns what the JSON holds."""
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which (default all)")
    parser.add_argument("--rounds", type=int, default=2, help="processes a way for time (default 2)")
    parser.add_argument("--steps", type=int, default=3, help="steps timed in each, after a first one (default 3)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it work at all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the report (default bench/results)")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one process's part
    args = parser.parse_args(argv)
    if args.run:
        case, way, steps, shape, sizes = json.loads(args.run)
        warnings.simplefilter("ignore")
        torch.save(run(case, way, steps, Shape(**shape), sizes), args.out)
        return {}
    results: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": machine(),
        "versions": versions(["transformers", "accelerate", "trl"]),
        "smoke": args.smoke,
        "cases": [],
    }
    stem = args.out / ("steps-smoke" if args.smoke else "steps")
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = memory.available() is None and not args.no_memory
    with progress(len(args.cases)) as (say, advance):
        for name in args.cases:
            shape = SMALL if args.smoke else Shape()
            results["cases"].append(measure(name, shape, args.rounds, args.steps, sizes, say))
            stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            stem.with_suffix(".md").write_text(markdown(results))
            advance()
    print(markdown(results))
    return results


if __name__ == "__main__":
    main()
