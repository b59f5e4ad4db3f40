"""An online run's folder with made-up numbers, in the shape that `drift run` writes."""

import json
import math

import numpy as np
from fake_run import trajectory, write_lines

from drift.config import dump, parse

STEPS, PROBLEMS, PROMPTS, GROUP = 24, 32, 8, 4
WARMUP, TRANSITION = 4, 6


def example(generator, step, index, taught=True, solved=True):
    """A made-up response of two turns, the first wrong."""
    turns = (["<answer>", "1", "4", "</answer>"], ["<answer>", "1", "5", "</answer>"])
    tokens = ["user: 7 + 8?", "\n", *turns[0], "\nuser: Incorrect.", "\n", *turns[1]]
    trained = [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]

    def values(low, high):
        return [round(float(generator.uniform(low, high)), 5) if on else 0.0 for on in trained]

    row = {"step": step, "prompt_id": f"p{index}", "index": index, "solved_at": 2 if solved else 0}
    row |= {"reward": 0.9, "advantage": 0.25, "phase": "both", "routing": 1.0}
    row |= {"policy_weight": 0.9, "distill_weight": 0.1, "rebellious_weight": 0.8, "tokens": tokens, "trained": trained}
    row |= {"logprobs": values(-3, 0), "entropy": values(0, 2)}
    if taught:
        row |= {"teacher_logprobs": values(-3, 0), "teacher_entropy": values(0, 2), "divergence": values(0, 0.6)}
        row |= {"rhythm": values(1, 2), "gate": values(0, 1), "bonus": values(1, 2)}
    return row


def metrics(generator, step, total):
    """What one step logs, of a training that learns for two thirds and then collapses."""
    learnt, fallen = min(1, step / total), max(0, 3 * step / total - 2)
    solved = (0.35 + 0.3 * learnt) * (1 - 0.8 * fallen) + 0.02 * generator.standard_normal()
    phase = 0 if step <= WARMUP else 1 if step <= WARMUP + TRANSITION else 2
    factor = 0.0 if phase == 0 else 1.0 if phase == 2 else (step - WARMUP - 1) / TRANSITION
    hard, easy = 0.35 - 0.2 * learnt, 0.1 + 0.2 * learnt
    named = {
        "reward": 0.8 * solved - 0.1,
        "solved": solved,
        "solved_first": 0.7 * solved,
        "repeat_rate": 0.1 + 0.7 * fallen,
        "entropy": 0.6 * (1 - 0.95 * fallen),
        "teacher_entropy": 0.4,
        "teacher_kl": 0.5 - 0.2 * learnt,
        "no_spread": 0.2,
        "gate": 0.25,
        "rebellious": 1.1,
        "loss": 0.01,
        "seconds_sampling": 2.0,
        "router/easy": easy,
        "router/medium": 1 - hard - easy,
        "router/hard": hard,
        "router/pass_rate": 0.4 + 0.2 * learnt,
        "router/teacher": 0.5 + 0.4 * learnt,
        "router/policy_share": 0.45,
        "router/policy_weight": 0.4,
        "router/distill_share": 0.5,
        "router/distill_weight": 0.2,
        "router/rebellious_share": 0.2,
        "router/rebellious_weight": 0.1,
        "buffer/problems": min(PROBLEMS, PROMPTS * step * 0.6),
        "buffer/fill": 1e-3,
        "buffer/asked": 10 * step,
        "buffer/served": 6 * step,
        "buffer/added": 8 * step,
        "curriculum/phase": phase,
        "curriculum/routing": factor,
        "difference/mean": 0.15,
        "watch/pass_at_1": solved,
        "watch/pass_at_2": math.sqrt(max(solved, 0)),
        "watch/pass_at_4": max(solved, 0) ** 0.25,
        "watch/reference_kl": 0.02 * step,
        "watch/low_entropy": float(fallen > 0.85),
        "watch/high_repeat": float(fallen > 0.6),
        "watch/low_solved": 0.0,
    }
    return {name: float(value) for name, value in named.items()}


def rollout_rows(generator, steps=STEPS):
    """Every problem comes again each PROBLEMS / PROMPTS steps; its skill rises a little every time."""
    skills = generator.beta(0.6, 0.9, PROBLEMS)
    rows = []
    for step in range(1, steps + 1):
        for place in range(PROMPTS):
            number = ((step - 1) * PROMPTS + place) % PROBLEMS
            skill = 1 - (1 - skills[number]) * 0.97**step
            for index in range(GROUP):
                row = trajectory(generator, f"p{number}", f"{number} + 7 = ?", number + 7, skill, index, turns=2)
                row["traj_idx"] += GROUP * ((step - 1) * PROMPTS // PROBLEMS)
                row |= {"step": step, "staleness": 0, "advantage": 0.25, "pass_rate": 0.5, "had_teacher": index > 0}
                rows.append(row | {"policy_weight": 1.0, "distill_weight": 0.0, "rebellious_weight": 0.5})
    return rows


def make_online_run(folder, algorithm="drift", seeds=2, stored=True):
    """A whole run folder; without `stored` there are neither trajectories nor responses token by token."""
    online = {"algorithm": algorithm, "steps": STEPS, "prompts": PROMPTS}
    if algorithm == "drift":
        online["curriculum"] = {"warmup_steps": WARMUP, "transition_steps": TRANSITION}
    config = parse(
        {"name": "online", "seeds": list(range(seeds)), "online": online, "task": {"train_problems": PROBLEMS}}
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    lines, results = [], {"base": [], algorithm: []}
    for seed in range(seeds):
        generator, inside = np.random.default_rng(seed), folder / f"seed-{seed}"
        for step in range(1, STEPS + 1):
            named = metrics(generator, step, STEPS)
            if algorithm == "grpo":
                apart = ("router/", "buffer/", "curriculum/", "teacher", "gate", "rebellious", "difference/")
                named = {name: value for name, value in named.items() if not name.startswith(apart)}
            prefix = f"seed-{seed}/{algorithm}"
            lines.append({"step": step, "time": 1e9} | {f"{prefix}/{name}": value for name, value in named.items()})
        (inside / algorithm).mkdir(parents=True)
        for arm, rates in (("base", (0.3, 0.15)), (algorithm, (0.5, 0.1))):
            solved = generator.choice([1, 2, 0], 200, p=[*rates, 1 - sum(rates)]).tolist()
            (inside / f"eval-{arm}.json").write_text(json.dumps({"solved_at": solved}))
            results[arm].append([sum(0 < t <= k for t in solved) / 200 for k in range(1, 6)])
        if stored:
            write_lines(inside / algorithm / "rollouts.jsonl", rollout_rows(generator))
            kinds = ((True, True), (True, False), (False, False))
            rows = [
                example(generator, step, index, *kind) for step in (3, 12, 18, 24) for index, kind in enumerate(kinds)
            ]
            write_lines(inside / algorithm / "examples.jsonl", rows)
    write_lines(folder / "metrics.jsonl", lines)
    shown = {
        arm: {"multi_at_5": [b[-1] for b in table], "single": [b[0] for b in table], "by_turn": table}
        for arm, table in results.items()
    }
    summary = {"name": "online", "results": shown, "seconds": {"train": 300.0, "evaluate": 20.0, "total": 320.0}}
    (folder / "summary.json").write_text(json.dumps(summary | {"seeds": list(range(seeds))}))
    return folder
