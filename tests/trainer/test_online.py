"""The online loop: its loss against the formula in plain torch, resumption to the same bits, and the whole job."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from scripted_engine import ScriptedEngine, WordTask, quarters, say

from drift import rhythm, store
from drift.config import ConfigError, dump, load, parse
from drift.config.algorithms import ALGORITHMS
from drift.engines.hf import HFEngine
from drift.jobs import run, stages
from drift.model import chat
from drift.model.policy import load_policy
from drift.online import loop as online
from drift.online.branches import Branches, denominators
from drift.online.curriculum import Phase
from drift.online.reprompt import Lesson, teacher_trajectory
from drift.online.samples import Sample, problems_of
from drift.online.teacher import Teacher
from drift.returns import advantages, trajectory_return
from drift.rhythm import StepMean
from drift.rollouts import rollout
from drift.routing import DifficultyRouter
from drift.track import Track
from drift.training import checkpoint, layout
from drift.training.offpolicy import log_ratios
from drift.training.optimizer import MasterAdamW

ROOT = Path(__file__).parent.parent.parent
SHORT = {"steps": 4, "prompts": 4, "curriculum": {"warmup_steps": 1, "transition_steps": 2}}


def config(folder, algorithm="drift", **sections):
    settings = {"algorithm": algorithm, **SHORT}
    if algorithm != "drift":
        del settings["curriculum"]
    settings |= sections.pop("online", {})
    made = quarters(folder, **sections)
    return parse({**made.model_dump(mode="json"), "online": settings, "seeds": [0]})


def conversations(policy):
    """Samples of one and of two turns, some with a teacher, with weights of every kind."""
    draw, samples = torch.Generator().manual_seed(0), []
    for number in range(5):
        messages = [{"role": "user", "content": f"q{number}"}]
        ids = chat.render(policy.tokenizer, messages, True)
        row = {"prompt_id": "p", "token_ids": ids, "loss_mask": [0] * len(ids), "turn_starts": []}
        for turn in range(1 + number % 2):
            if turn:
                messages.append({"role": "user", "content": "Incorrect."})
                longer = chat.extend(policy, row["token_ids"], messages)
                row["loss_mask"] += [0] * (len(longer) - len(row["token_ids"]))
                row["token_ids"] = longer
            said = torch.randint(20, 200, (3 + number,), generator=draw).tolist()
            row["turn_starts"].append(len(row["token_ids"]))
            row["token_ids"], row["loss_mask"] = row["token_ids"] + said, row["loss_mask"] + [1] * len(said)
            messages.append({"role": "assistant", "content": policy.tokenizer.decode(said)})
        row["logprobs"] = [-5.0 - i % 3 if on else 0.0 for i, on in enumerate(row["loss_mask"])]
        [trajectory] = chat.to_trajectories(policy, row, index=number, turns="assistant")
        trajectory.advantage = [1.0, -0.5, 0.0, 0.75, -1.0][number]
        sample = Sample(trajectory, messages, 0, 0.0, [], 0)
        sample.policy, sample.distill, sample.rebellious = [
            (1.0, 0, 0),
            (0, 1.0, 0),
            (0.5, 0.35, 1),
            (0.9, 0, 0.8),
            (1, 0, 0),
        ][number]
        if number in (1, 2, 3):
            lesson = Lesson(f"a{number}")
            sample.taught = teacher_trajectory(policy.tokenizer, trajectory, messages, lesson)
        samples.append(sample)
    return samples


def by_hand(policy, reference, samples, settings, phase, d_mean, h_mean):
    """L of B7 in float64 over whole logits, one trajectory at a time, with `drift.rhythm`'s weights.

    Each branch is divided by its own tokens: those of samples with a policy weight, those of samples with a teacher.
    """
    total = 0.0
    policy_tokens = sum(t.stop - t.start for s in samples if s.policy for t in s.trajectory.turns)
    taught_tokens = sum(t.stop - t.start for s in samples if s.taught for t in s.trajectory.turns)
    if settings.denominators == "shared":
        policy_tokens = taught_tokens = sum(t.stop - t.start for s in samples for t in s.trajectory.turns)
    differences, entropies = [], []
    for sample in samples:
        spots = [i for t in sample.trajectory.turns for i in range(t.start, t.stop)]
        turns = torch.tensor([n for n, t in enumerate(sample.trajectory.turns) for _ in range(t.start, t.stop)])

        def rows(model, trajectory, moved=0, spots=spots):
            logits = model(input_ids=torch.tensor(trajectory.token_ids)[None]).logits[0].double()
            return logits[[i + moved - 1 for i in spots]].log_softmax(-1)

        ids = torch.tensor(sample.trajectory.token_ids)[spots]
        student = rows(policy, sample.trajectory)
        logp = student.gather(1, ids[:, None])[:, 0]
        behind = torch.tensor(sample.trajectory.logprobs, dtype=torch.float64)[spots]
        correction = (logp.detach() - behind).exp().clamp(max=2.0)
        ratio = (logp - logp.detach()).exp()
        policy_token = -correction * ratio * sample.trajectory.advantage
        weight = torch.ones(len(spots), dtype=torch.float64)
        taught = sample.taught is not None
        share, policy_share, bonus_share = phase.weights(taught, sample.distill, sample.policy, sample.rebellious)
        if sample.taught is not None:
            with torch.no_grad():
                moved = len(sample.taught.token_ids) - len(sample.trajectory.token_ids)
                teacher = rows(reference, sample.taught, moved)
            entropy = [-(x.exp() * x).sum(-1).detach() for x in (student, teacher)]
            mask = torch.ones(len(spots), dtype=torch.bool)
            wave = rhythm.rhythm_weight(*entropy, mask, turns, d_mean).double()
            gate = rhythm.rhythm_gate(wave)
            known = teacher.gather(1, ids[:, None])[:, 0]
            weight = rhythm.rebellious_weight(logp, known, torch.full_like(gate, bonus_share), gate).double()
            differences += rhythm.difference(*entropy, mask, turns).tolist()
            entropies += entropy[0].tolist()
            alpha = settings.distill.alpha
            mixture = ((1 - alpha) * student.exp() + alpha * teacher.exp()).log()
            divergence = (1 - alpha) * (student.exp() * (student - mixture)).sum(-1)
            divergence = divergence + alpha * (teacher.exp() * (teacher - mixture)).sum(-1)
            if phase.weigh_by_entropy:
                divergence = divergence * (entropy[0] / h_mean)
            if phase.name != "warmup":
                divergence = divergence * wave
            total = total + settings.distill.weight * share * (correction * divergence).sum() / taught_tokens
        total = total + policy_share * (weight * policy_token).sum() / policy_tokens
    return total, differences, entropies


@pytest.mark.parametrize(("max_tokens", "tree"), [(4096, "off"), (70, "off"), (4096, "on")])
@pytest.mark.parametrize(
    ("phase", "shared"),
    [(Phase("transition", 0.6), False), (Phase("both", 1.0), True), (Phase("warmup", 0.0, True), False)],
)
def test_loss_and_gradient_are_those_of_the_formula(tmp_path, max_tokens, tree, phase, shared):
    """Whole vocabulary; a teacher that is not the policy; one pack, several, or prefix trees; the sampler's log-probs far off."""
    made = config(
        tmp_path,
        train={"max_tokens": max_tokens, "max_length": max_tokens, "tree": tree},
        online={"distill": {"top_k": None, "weight": 0.7}, "denominators": "shared" if shared else "branch"},
    )
    policy, other = load_policy(made.model, seed=0), load_policy(made.model, seed=1)
    optimizer = MasterAdamW(policy.model, made.train)
    teacher = Teacher(policy.model.named_parameters(), made.online.teacher)
    teacher.load_state_dict({"shadow": other.state(), "updates": 0, "skipped": 0})
    difference, entropy = StepMean(), StepMean()
    difference.value, entropy.value = 0.05, 5.0
    samples = conversations(policy)
    branches = Branches(policy, optimizer, made, ALGORITHMS["drift"], difference, entropy)
    measured = branches.accumulate(samples, phase, teacher, denominators(samples, made.online))
    gradient = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    optimizer.zero()
    loss, differences, entropies = by_hand(policy.model, other.model, samples, made.online, phase, 0.05, 5.0)
    loss.backward()
    assert measured.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, p in policy.model.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-3
    for mean, values in ((difference, differences), (entropy, entropies)):
        mean.advance()
        assert mean.value == pytest.approx(sum(values) / len(values), rel=1e-3)
    total, count = measured.sums["teacher_kl"]
    assert count == len(entropies)
    assert total / count != 0


class Interrupted(Exception):
    pass


class Stops(Track):
    def __init__(self, at):
        super().__init__(None, progress=False)
        self.at = at

    def log(self, step, **metrics):
        if step == self.at:
            raise Interrupted


def play_through(made, folder, track=None, rollouts=None):
    policy, task = load_policy(made.model, seed=0), WordTask(4)
    engine = HFEngine(policy)
    task.verify = lambda problem, answer: len(answer) % 2 == 0  # what an untrained model says is right now and then
    where = {"checkpoint_dir": folder, "rollouts": rollouts}
    stats = online.train_online(policy, engine, task, task.problems("train"), made, seed=3, track=track, **where)
    return policy, stats


@pytest.fixture
def talkative(monkeypatch):
    """An untrained model never writes an answer's tags: half of what it says counts as one."""
    monkeypatch.setattr(rollout, "parse_answer", lambda said, tag: said.strip() or None)


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path, talkative):
    made = config(tmp_path, train={"save_every": 2}, online={"steps": 5})
    files = [tmp_path / "whole.jsonl", tmp_path / "half.jsonl"]
    whole, stats = play_through(made, tmp_path / "whole", rollouts=files[0])
    with pytest.raises(Interrupted):
        play_through(made, tmp_path / "half", Stops(4), files[1])
    assert checkpoint.latest(tmp_path / "half").name == "checkpoint-2"
    assert max(json.loads(line)["step"] for line in files[1].read_text().splitlines()) == 4
    files[1].write_bytes(files[1].read_bytes()[:-99])  # and the last write was torn
    resumed, again = play_through(made, tmp_path / "half", rollouts=files[1])
    assert files[1].read_bytes() == files[0].read_bytes()
    assert resumed.hash() == whole.hash() != load_policy(made.model, seed=0).hash()
    assert again.rewards == stats.rewards
    assert len(set(stats.rewards)) > 1
    ends = [json.loads((tmp_path / d / "checkpoint-5" / "state.json").read_text()) for d in ("whole", "half")]
    for part in ("router", "buffer", "curriculum", "difference", "entropy_mean", "teacher"):
        assert ends[0]["stats"][part] == ends[1]["stats"][part], part
    assert ends[0]["stats"]["buffer"]["problems"]
    shadows = [checkpoint.load_tensors(tmp_path / d / "checkpoint-5", "teacher") for d in ("whole", "half")]
    assert all(torch.equal(shadows[0][name], shadows[1][name]) for name in shadows[0])
    with pytest.raises(checkpoint.CheckpointError, match="online was"):
        play_through(config(tmp_path, train={"save_every": 2}, online={"steps": 6}), tmp_path / "half")


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo", "sdpo", "srpo", "drift"])
def test_every_algorithm_takes_a_step(tmp_path, algorithm, talkative):
    logged = {}

    class Keeps(Track):
        def log(self, step, **metrics):
            logged[step] = {name.removeprefix("online/"): value for name, value in metrics.items()}

    made = config(tmp_path, algorithm, online={"steps": 2})
    policy, stats = play_through(made, None, Keeps(None, progress=False))
    assert (stats.steps, stats.skipped) == (2, 0)
    assert policy.hash() != load_policy(made.model, seed=0).hash()
    for row in logged.values():
        for name in ("reward", "solved", "entropy", "repeat_rate", "sampler_kl", "router/pass_rate", "router/teacher"):
            assert math.isfinite(row[name]), name
        assert abs(row["sampler_kl"]) < 1e-3
        assert ("buffer/fill" in row) == ("gate" in row) == (algorithm == "drift")
        assert ("teacher_kl" in row) == (algorithm in ("sdpo", "srpo", "drift"))
        assert (row["router/policy_weight"] == 0) == (algorithm == "sdpo")


@pytest.mark.parametrize("algorithm", ["gspo", "drift"])
def test_on_prefix_trees_a_whole_step_has_the_same_metrics_and_weights(tmp_path, algorithm, talkative):
    logged, ends = {"off": {}, "on": {}}, {}

    class Keeps(Track):
        def log(self, step, **metrics):
            logged[tree][step] = metrics

    for tree in logged:
        made = config(tmp_path, algorithm, online={"steps": 2}, train={"tree": tree, "lr": 1e-4})
        policy, _ = play_through(made, None, Keeps(None, progress=False))
        ends[tree] = policy.state()
    for name, want in ends[
        "off"
    ].items():  # Adam divides noise by itself: single weights may be a tenth of a step apart
        apart = (ends["on"][name] - want).abs()
        assert apart.max() < 2e-5, name
        assert apart.mean() < 1e-7, name
    for step, row in logged["off"].items():
        shared = logged["on"][step]
        for name, least in (("online/tokens_shared", 0.2), ("online/attention_shared", 0.02)):
            assert shared.pop(name) > least
            assert row.pop(name) == 0
        timed = {name for name in row if any(word in name for word in ("time", "seconds", "perf/"))}
        assert shared.keys() == row.keys()
        for name in row.keys() - timed:
            assert shared[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5, nan_ok=True), name


def test_lessons_and_routes_of_a_scripted_batch(tmp_path):
    """One problem is solved by nobody, one by all at once; who is taught what follows from it."""
    made = config(tmp_path, rollout={"n": 2, "turns": 2}, online={"prompts": 2, "steps": 1})
    policy = load_policy(made.model, seed=0)
    engine = ScriptedEngine(policy, {"q0": [say("x"), say("x")], "q1": [say("x"), say("a1")]})
    task = WordTask(2)
    loop = online._Loop(policy, engine, task, task.problems("train"), made, 0)
    loop.guide.buffer.add("p0", say("a0"), 1.0, 0)
    samples = loop._sample(0)
    loop.guide.route(samples, 0)
    by_problem = {name: [s for s in samples if s.problem_id == name] for name in ("p0", "p1")}
    assert [s.solved_at for s in by_problem["p0"]] == [0, 0]
    assert [s.solved_at for s in by_problem["p1"]] == [2, 2]
    assert all(s.trajectory.advantage == 0 for s in samples)
    assert all(say("a0") in policy.tokenizer.decode(s.taught.token_ids) for s in by_problem["p0"])
    assert all(say("a1") in policy.tokenizer.decode(s.taught.token_ids) for s in by_problem["p1"])  # the sibling's
    assert all(s.distill > 0 and s.policy == 0 for s in by_problem["p0"])
    assert all(s.distill == 0 and 0 < s.policy < 1 for s in by_problem["p1"])
    assert [e.text for e in loop.guide.buffer.demonstrations("p1", 4)] == [say("a1")]


def test_what_is_stored_of_a_step(tmp_path, talkative):
    """Rows of every step, in the published format, with what the router said; enough to give its weights again."""
    made = config(tmp_path, online={"steps": 6}, rollout={"temperature": 0.8})
    path, logged = tmp_path / "rollouts.jsonl", []

    class Keeps(Track):
        def log(self, step, **metrics):
            logged.append(metrics)

    play_through(made, None, Keeps(None, progress=False), path)
    rows = store.read(path)
    assert [row["step"] for row in rows] == [step for step in range(1, 7) for _ in range(16)]
    assert [row["traj_idx"] for row in rows if row["prompt_id"] == "p2"] == list(range(24))
    base = load_policy(made.model, seed=0).hash()
    assert {row["policy_hash"] for row in rows} == {base, *(f"{base}+{n}" for n in range(1, 6))}
    router = DifficultyRouter(made.online.router, 3)
    for step, metrics in enumerate(logged, 1):
        batch = [row for row in rows if row["step"] == step]
        assert all(row["staleness"] == 0 and row["policy_version"] == step - 1 for row in batch)
        assert all((row["temperature"], row["top_p"]) == (0.8, 1.0) for row in batch)
        solved, taught = [row["t_star"] is not None for row in batch], [row["had_teacher"] for row in batch]
        assert sum(solved) / 16 == metrics["online/solved"]
        assert sum(taught) / 16 == metrics["online/router/teacher"]
        routes = router.update([row["prompt_id"] for row in batch], solved, taught, step - 1)
        for key in ("distill", "policy", "rebellious"):
            assert [row[f"{key}_weight"] for row in batch] == getattr(routes, key).tolist()
        assert [row["pass_rate"] for row in batch] == routes.pass_rate.tolist()
        for name in {row["prompt_id"] for row in batch}:
            group = [row for row in batch if row["prompt_id"] == name]
            returns = [trajectory_return(row) for row in group]
            expected = [value - sum(returns) / len(returns) for value in returns]
            assert [row["advantage"] for row in group] == pytest.approx(expected, abs=1e-12)
    assert any(row["had_teacher"] for row in rows)
    assert any(row["advantage"] for row in rows)


def test_a_trained_model_refuses_or_corrects_what_others_sampled(tmp_path, talkative, capfd, monkeypatch):
    """`drift train` on the trajectories of an online run: the base's own are taken as they are, later ones corrected."""
    made = config(tmp_path, online={"steps": 3}, train={"lr": 3e-3}, rollout={"turns": 2, "temperature": 0.8})
    path = tmp_path / "rollouts.jsonl"
    play_through(made, None, rollouts=path)
    base, rows = load_policy(made.model, seed=0), store.read(path)
    packs, laid = layout.packs, []
    monkeypatch.setattr(layout, "packs", lambda *args, **options: laid.append(packs(*args, **options)) or laid[-1])
    ratios, stats = log_ratios(base, rows, 50.0, max_tokens=100)
    assert layout.saved(laid[0]) > 0.1  # scored on prefix trees
    for row, ratio in zip(rows, ratios):
        if row["step"] == 1:
            assert ratio == 0
            continue
        ids = torch.tensor([row["token_ids"]])
        with torch.no_grad():
            logp = (base.model(input_ids=ids).logits[0, :-1].double() / 0.8).log_softmax(-1)
        mask = torch.tensor(row["loss_mask"][1:]).bool()
        gap = logp.gather(1, ids[0, 1:, None])[:, 0] - torch.tensor(row["logprobs"][1:], dtype=torch.float64)
        assert ratio == pytest.approx(float(gap[mask].sum()), abs=1e-3)
    assert max(map(abs, ratios)) > 0.1
    assert stats["offpolicy_share"] == pytest.approx(2 / 3)
    offline = parse({**made.model_dump(mode="json"), "online": None, "warm_start": {"enabled": False}})
    with pytest.raises(store.StoreError, match=r"weights\.off_policy=correct"):
        stages.fit(offline, path, tmp_path / "refused")
    weights = {"off_policy": "correct", "off_policy_clip": 0.2}
    offline = offline.model_copy(update={"weights": offline.weights.model_copy(update=weights)})
    done = stages.fit(offline, path, tmp_path / "corrected")
    assert done.steps == 3
    [logged] = [
        json.loads(line)
        for line in (tmp_path / "corrected" / "metrics.jsonl").read_text().splitlines()
        if "weights/offpolicy_share" in line
    ]
    clipped = sum(abs(ratio) > 0.2 for ratio in ratios) / 32
    assert logged["weights/offpolicy_clipped_share"] == pytest.approx(clipped, abs=1 / 32)
    assert 0 < clipped < 1
    assert 0 < logged["weights/offpolicy_gap"] < 1
    said = capfd.readouterr().err
    assert re.search(r"the importance ratios explode: \d+% of the trajectories that another policy sampled", said)
    assert "nats a token" not in said
    wide = offline.weights.model_copy(update={"off_policy_clip": 50.0})
    stages.fit(offline.model_copy(update={"weights": wide}), path, tmp_path / "quiet")
    assert "explode" not in capfd.readouterr().err
    narrow = offline.train.model_copy(update={"sampler_gap": 1e-5})
    stages.fit(offline.model_copy(update={"weights": wide, "train": narrow}), path, tmp_path / "told")
    said = capfd.readouterr().err
    assert "nats a token from the policy's" in said
    assert "of the trajectories" not in said
    rows[-1].pop("logprobs")
    with pytest.raises(store.StoreError, match="has no logprobs"):
        log_ratios(base, rows, 5.0)


def test_advantages():
    assert advantages([1.0, 0.0, 0.0, 1.0], False) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([3.0, 0.0, 0.0], True) == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)])
    assert advantages([0.3, 0.3, 0.3], True) == [0.0, 0.0, 0.0]


def test_problems_are_asked_in_turn():
    asked = [i for step in range(10) for i in problems_of(step, 7, 3, 0)]
    first = [i for step in range(7) for i in problems_of(step, 21, 3, 0)]
    assert sorted(first) == list(range(21))
    assert all(asked.count(i) in (3, 4, 5) for i in range(7))
    assert sorted(problems_of(5, 4, 9, 0)) == [0, 1, 2, 3]


def test_the_whole_job(tmp_path):
    """Base, training, evaluation, summary, report; a second run has nothing to do."""
    made = config(tmp_path, online={"steps": 3}, train={"lr": 1e-4})
    summary = run.run(made)
    folder = tmp_path / "runs" / "digits"
    assert set(summary["results"]) == {"base", "drift"}
    assert "ess" not in summary
    assert summary["settings"].keys() == {
        "gamma",
        "repetition",
        "n",
        "turns",
        "train_problems",
        "eval_problems",
        "lr",
    }  # what the method reads
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ours = [row for row in rows if "seed-0/drift/reward" in row]
    assert [row["step"] for row in ours] == [1, 2, 3]
    for name in ("solved", "entropy", "repeat_rate", "buffer/fill", "router/teacher", "router/distill_share"):
        assert all(f"seed-0/drift/{name}" in row for row in ours), name
    assert any(row.get("seed-0/drift/router/teacher", 0) > 0 for row in ours)
    assert any(row.get("seed-0/drift/gate") is not None for row in ours)
    assert not (folder / "seed-0" / "drift" / "checkpoints").exists()
    rows = store.read(folder / "seed-0" / "drift" / "rollouts.jsonl")
    assert [len([row for row in rows if row["step"] == step]) for step in (1, 2, 3)] == [16, 16, 16]
    assert "trained online" in (folder / "report.html").read_text()
    before = (folder / "metrics.jsonl").read_text()
    assert run.run(made) == summary
    assert (folder / "metrics.jsonl").read_text() == before
    assert load(folder / "config.yaml") == made


def test_settings():
    made = load("configs/online.yaml")
    assert (made.online.algorithm, made.rollout.n, made.online.prompts, made.trained) == ("drift", 8, 32, ["drift"])
    assert load("configs/quickstart.yaml").trained == ["uniform", "success_only", "drift"]
    assert "online: null" in dump(load("configs/quickstart.yaml"))
    for settings, said in (
        (
            {"online": {"algorithm": "sdpo", "router": {"mode": "grpo"}}},
            "online: online.router.mode 'grpo' contradicts algorithm sdpo",
        ),
        (
            {"online": {"algorithm": "grpo", "curriculum": {"warmup_steps": 3}}},
            "warmup_steps 3 contradicts algorithm grpo",
        ),
        ({"online": {"router": {"temprature": 1}}}, "did you mean online.router.temperature?"),
        (
            {"online": {"teacher": {"weights": "emma"}}},
            "'emma' should be 'ema', 'trust_region', 'weight_mix', 'frozen' or 'policy'",
        ),
    ):
        with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
            parse({"name": "q", **settings})
