"""The online method on a thinking format: every part of it acts, on some samples and tokens and not on all."""

import pytest
import torch
from scripted_engine import END, WordTask, say
from test_online import config, conversations

from drift import store
from drift.config.algorithms import ALGORITHMS
from drift.engines import Sample
from drift.model import chat
from drift.model.policy import load_policy
from drift.online import train_online
from drift.online.branches import Branches, denominators
from drift.online.teacher import Teacher
from drift.packing import pack
from drift.rhythm import StepMean
from drift.track import Track
from drift.training.optimizer import MasterAdamW

RIGHT = {"q0": 7, "q1": 4, "q2": 1, "q3": 1}  # of eight samples: an easy, a medium and two hard problems


class Thinker:
    """Answers in `<think>…</think><answer>…</answer>`, eight samples a problem, each derivation in other words.

    The only right answer to q3 is the same text in every step. Log-probs are the policy's own.
    """

    def __init__(self, policy):
        self.policy, self.batches = policy, 0

    def sync(self):
        self.batches += 1

    def generate(self, prompts, **settings):
        counts = dict.fromkeys(RIGHT, 0)
        return [self._say(prompt, counts) for prompt in prompts]

    def _say(self, prompt, counts):
        question = self.policy.tokenizer.decode(prompt).split("user\n", 1)[1][:2]
        number = counts[question]
        counts[question] += 1
        right = number < RIGHT[question]
        when = 0 if question == "q3" and right else self.batches
        line = f"<think>{number} and {when}</think>" + say(f"a{question[1]}" if right else "x")
        ids = chat.encode(self.policy.tokenizer, line + END)
        with torch.no_grad():
            logits = self.policy.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        return Sample(ids, logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(), True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Metrics of each step of a real training, and its rows."""
    folder, logged = tmp_path_factory.mktemp("thinking"), []

    class Keeps(Track):
        def log(self, step, **metrics):
            logged.append({name.removeprefix("online/"): value for name, value in metrics.items()})

    online = {"prompts": 4, "steps": 7, "curriculum": {"warmup_steps": 1, "transition_steps": 1}}
    made = config(folder, rollout={"n": 8, "turns": 1}, train={"lr": 3e-3, "warmup_ratio": 0.0}, online=online)
    policy, task = load_policy(made.model, seed=0), WordTask(4)
    rows, problems = folder / "rows.jsonl", task.problems("train")
    track = Keeps(None, progress=False)
    train_online(policy, Thinker(policy), task, problems, made, seed=0, track=track, rollouts=rows)
    return logged, store.read(rows)


@pytest.mark.parametrize(
    "name",
    ["right_taught", "right_policy_easy", "right_policy_medium", "right_policy_hard"],
)
def test_right_samples_have_teachers_and_routed_weights(trained, name):
    value = trained[0][-1][f"router/{name}"]
    assert 0 < value < 1, value


@pytest.mark.parametrize("name", ["gate_open", "bonus_share"])
def test_gates_open_and_bonuses_are_given_on_a_share_of_the_tokens(trained, name):
    value = trained[0][-1][name]
    assert 0 < value < 1, value


def test_who_is_taught(trained):
    """Right siblings teach each other although their answers read the same; a text never teaches itself."""
    last = [row for row in trained[1] if row["step"] == 7]
    taught = {
        q: [row["had_teacher"] for row in last if row["prompt_id"] == f"p{q[1]}" and row["t_star"]] for q in RIGHT
    }
    assert taught == {"q0": [True] * 7, "q1": [True] * 4, "q2": [True], "q3": [False]}  # q2's by the buffer
    assert all(row["had_teacher"] for row in last if not row["t_star"])
    assert trained[0][0]["router/right_taught"] == 11 / 13  # siblings alone: the buffer was empty


def test_warmup_distils_right_samples_too(trained):
    """Stage 1: nothing but the divergence moves the policy, although the router has weights already."""
    first, last = trained[0][0], trained[0][-1]
    assert (first["curriculum/phase"], first["curriculum/routing"]) == (0, 0.0)
    assert (last["curriculum/phase"], last["curriculum/routing"]) == (2, 1.0)
    assert first["grad_norm"] > 0
    assert first["rebellious"] == 1.0


def test_the_trust_region_mixes_logits(tmp_path):
    """(1 − mix)·reference's + mix·policy's logits, on the teacher's own prompt, at each token with a teacher."""
    made = config(tmp_path, online={"teacher": {"weights": "trust_region", "mix": 0.3}})
    policy, reference = load_policy(made.model, seed=0), load_policy(made.model, seed=1)
    teacher = Teacher(policy.model.named_parameters(), made.online.teacher)
    teacher.load_state_dict({"shadow": reference.state(), "updates": 0, "skipped": 0})
    optimizer = MasterAdamW(policy.model, made.train)
    branches = Branches(policy, optimizer, made, ALGORITHMS["drift"], StepMean(), StepMean())
    samples = conversations(policy)
    packs = pack([s.trajectory for s in samples], 4096, turns="assistant")
    sides = [[samples[index] for index in batch.indices] for batch in packs]
    [head], [batch], [side] = branches._teach(sides, packs, teacher), packs, sides
    logits, starts = head.hidden @ head.head.weight.T, batch.cu_seqlens.tolist()
    for sample, start in zip(side, starts):
        if sample.taught is None:
            continue
        ids = torch.tensor(sample.taught.token_ids)[None]
        with torch.no_grad():
            mixed = torch.lerp(reference.model(input_ids=ids).logits[0], policy.model(input_ids=ids).logits[0], 0.3)
        moved = len(sample.taught.token_ids) - len(sample.trajectory.token_ids)
        for turn in sample.trajectory.turns:
            rows = logits[start + turn.start - 1 : start + turn.stop - 1]
            torch.testing.assert_close(
                rows, mixed[turn.start + moved - 1 : turn.stop + moved - 1], rtol=1e-4, atol=1e-4
            )


def test_denominators_count_each_branch_over_the_whole_batch(tmp_path):
    samples = conversations(load_policy(config(tmp_path).model, seed=0))
    tokens = [sample.tokens for sample in samples]

    def of(algorithm="drift", **online):
        made = denominators(samples, config(tmp_path, algorithm, online=online).online)
        return made.policy, made.distill

    assert of() == (sum(tokens) - tokens[1], sum(tokens[1:4]))  # sample 1 has no policy weight; 1 to 3 have a teacher
    assert of(denominators="shared") == (sum(tokens), sum(tokens))
    assert of("gspo")[0] == 4  # sequences
