"""A run folder with made-up numbers, in the shape that `drift run` writes."""

import json

import numpy as np

from drift.config import dump, parse


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trajectory(generator, prompt_id, question, answer, skill, number, turns=5):
    """A made-up row: right with probability `skill` a turn, now and then no answer that can be parsed."""
    messages = [{"role": "user", "content": question}]
    verifier, answers, penalty, star = {}, [], 0.0, None
    for turn in range(1, turns + 1):
        right = generator.random() < skill
        given = answer if right else answer + int(generator.integers(1, 4)) * (-1) ** turn
        parsed = right or generator.random() > 0.08
        text = f"<think>{question} looks like {given}</think><answer>{given}</answer>" if parsed else f"it is {given}"
        messages.append({"role": "assistant", "content": text})
        verifier[f"t{turn}"] = int(right)
        if parsed:
            answers.append(str(given))
        else:
            penalty -= 0.1
        if right:
            star = turn
            break
        if turn < turns:
            messages.append({"role": "user", "content": "Incorrect. Please think again."})
    rewards = {key: float(value) for key, value in verifier.items()}
    return {
        "prompt_id": prompt_id,
        "messages": messages,
        "verifier": verifier,
        "turn_rewards": rewards,
        "answer_norms": answers,
        "format_penalty": penalty,
        "t_star": star,
        "traj_idx": number,
    }


def rollout_rows(seed, prompts=24, n=16):
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(prompts):
        a, b = (int(x) for x in generator.integers(10, 60, 2))
        skill = float(generator.beta(0.5, 1.6))
        rows += [
            trajectory(generator, f"{number:04x}{a:02d}{b:02d}", f"{a} + {b} = ?", a + b, skill, i) for i in range(n)
        ]
    return rows


def make_run(folder, seeds=3, prompts=24, summary=True):
    """A whole run folder with made-up numbers; the one other tests and a look in a browser start from."""
    generator = np.random.default_rng(0)
    config = parse({"name": "quickstart", "seeds": list(range(seeds))})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    means = {"base": (0.24, 0.44), "uniform": (0.31, 0.55), "success_only": (0.36, 0.585), "drift": (0.37, 0.60)}
    results = {}
    for arm, (single, multi) in means.items():
        table = []
        for seed in range(seeds):
            luck = 0.03 * np.sin(seed * 2.3) + 0.006 * generator.standard_normal()
            shape = np.array([0, 0.55, 0.8, 0.93, 1])
            by_turn = single + (multi - single) * shape + luck
            solved = [int(t) for t in 1 + np.searchsorted(by_turn, generator.random(1000))]
            solved = [t if t <= 5 else 0 for t in solved]
            table.append([sum(0 < t <= k for t in solved) / 1000 for k in range(1, 6)])
            path = folder / f"seed-{seed}" / f"eval-{arm}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"solved_at": solved}))
        results[arm] = {"multi_at_5": [b[-1] for b in table], "single": [b[0] for b in table], "by_turn": table}
    write_lines(folder / "rollouts.jsonl", rollout_rows(1, prompts))
    lines = []
    for seed in range(seeds):
        for arm in ("uniform", "success_only", "drift"):
            for step in range(1, 73):
                loss = 0.25 + 0.5 * np.exp(-step / 25) + 0.04 * generator.standard_normal()
                name = f"seed-{seed}/{arm}"
                values = {"loss": loss, "grad_norm": 1 + generator.random(), "lr": 3e-4 * min(1, step / 7)}
                values |= {"perf/tokens_per_second": 9000 + 800 * generator.standard_normal()}
                lines.append({"step": step, "time": 1e9} | {f"{name}/{k}": v for k, v in values.items()})
    write_lines(folder / "metrics.jsonl", lines)
    if summary:
        seconds = {"warm_start": 71.0, "rollouts": 48.5, "train": 139.0, "evaluate": 160.0, "total": 431.0}
        content = {"name": "quickstart", "results": results, "seconds": seconds, "seeds": list(range(seeds))}
        content["ess"] = [0.2 + 0.01 * seed for seed in range(seeds)]
        (folder / "summary.json").write_text(json.dumps(content))
    return folder
