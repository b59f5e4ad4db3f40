"""Environments: what they answer, what is counted, and that a tool's words are rendered and never trained."""

import doctest
import json

import pytest
from scripted_engine import END, ScriptedEngine, WordTask, quarters, say

from drift import store
from drift.config import ConfigError, ModelConfig, RolloutConfig, parse
from drift.engines import Sample
from drift.model import chat
from drift.model.policy import load_policy
from drift.online import loop as online
from drift.packing import pack
from drift.returns import trajectory_return
from drift.rollouts import environments
from drift.rollouts.environments import CALCULATOR, Step, ToolEnvironment, VerifyEnvironment
from drift.rollouts.feedback import FEEDBACK, Feedback
from drift.rollouts.rollout import Episode, collect, play
from drift.track import Track
from drift.training.trainer import train

SETTINGS = RolloutConfig(n=1, turns=3, max_new_tokens=64, tool="calculator", tool_calls=4)
CALLS = [  # two calls, a wrong answer, a call that fails, the right answer
    "<think>hm</think><tool_call>15 * 16</tool_call><tool_call>2 ** 5</tool_call>",
    say("x"),
    "<tool_call>9**9**9</tool_call>",
    say("a0"),
]


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=2)


def asked(number):
    return f"q{number}\n\n{CALCULATOR}"


def scripted(policy, lines, settings=SETTINGS, **options):
    engine, task = ScriptedEngine(policy, lines), WordTask(len(lines))
    jobs = [(problem, 0) for problem in task.problems("train")]
    episodes = play(policy, engine, task, jobs, settings, seed=[7], **options)
    return [store.validate(episode.row(settings.format_penalty)) for episode in episodes]


def test_a_conversation_with_a_calculator(policy):
    calls, plain = scripted(policy, {asked(0): CALLS, asked(1): [say("a1")]})
    said = [(message["role"], message["content"]) for message in calls["messages"]]
    assert said[:2] == [("user", asked(0)), ("assistant", CALLS[0])]
    assert said[2:6] == [("tool", "240"), ("tool", "32"), ("assistant", say("x")), ("user", FEEDBACK)]
    assert said[6] == ("assistant", CALLS[2])
    assert said[7][0] == "tool"
    assert "Error: the result could have more than 1024 bits" in said[7][1]
    assert said[8:] == [("assistant", say("a0"))]
    assert (calls["tool_calls"], calls["tool_errors"]) == (3, 1)
    assert calls["verifier"] == {"t1": 0, "t2": 1}  # calls are no attempts
    assert (calls["t_star"], calls["answer_norms"], calls["format_penalty"]) == (2, ["x", "a0"], 0.0)
    assert trajectory_return(calls) == pytest.approx(0.9)
    assert plain["t_star"] == 1
    assert "tool_calls" not in plain
    tokenizer = policy.tokenizer
    assert calls["token_ids"] == chat.render(tokenizer, calls["messages"])[:-1]  # all but the last line break
    sampled = [token for token, on in zip(calls["token_ids"], calls["loss_mask"]) if on]
    assert tokenizer.decode(sampled) == "".join(line + END for line in CALLS)
    others = tokenizer.decode([token for token, on in zip(calls["token_ids"], calls["loss_mask"]) if not on])
    assert "tool\n240" in others
    assert all(value == 0.0 for value, on in zip(calls["logprobs"], calls["loss_mask"]) if not on)
    assert len(calls["turn_starts"]) == 4


def test_what_the_calculator_does_not_answer(policy):
    lines = {
        asked(0): [
            "<tool_call>1</tool_call>" * 3,
            "<tool_call>1</tool_call>" * 2,
            "<tool_call>2</tool_call>",
            "?",
            "??",
        ],
        asked(1): [
            "<think><tool_call>1</tool_call>" + say("a1") + "</think> so",
            say("a1") + "<tool_call>2</tool_call>",
        ],
        asked(2): ["<tool_call>1</tool_call>"] * 4 + [f"<tool_call>{n}</tool_call>" for n in "567"],
    }
    greedy, thinks, never = scripted(policy, lines)
    texts = [message["content"] for message in greedy["messages"]]
    assert texts[5:7] == [
        "<tool_call>1</tool_call>" * 2,
        "Error: no more than 4 calls. Answer inside <answer> and </answer>.",
    ]
    assert texts[8] == "2"  # the fourth call is still there
    assert greedy["verifier"] == {"t1": 0, "t2": 0, "t3": 0}  # too many calls, "?" and what comes after it
    assert greedy["tool_calls"] == 4
    assert [message["content"] for message in thinks["messages"][2:3]] == [FEEDBACK]  # thinking calls nothing
    assert (thinks["t_star"], thinks["format_penalty"]) == (2, -0.1)  # an answer beside a call is an answer
    assert "tool_calls" not in thinks
    assert (never["tool_calls"], never["t_star"], never["answer_norms"]) == (4, None, [])
    assert never["format_penalty"] == pytest.approx(-0.3)
    assert never["messages"][-1] == {"role": "assistant", "content": "<tool_call>7</tool_call>"}


def test_rows_with_tool_messages_train(policy, tmp_path):
    """Offline, from the stored file; targets are exactly what the model said."""
    engine, task = ScriptedEngine(policy, {asked(0): CALLS, asked(1): [say("a1")]}), WordTask(2)
    with Track(tmp_path, progress=False) as track:
        collect(policy, engine, task, task.problems("train"), SETTINGS, tmp_path / "r.jsonl", 0, track)
    [logged] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [logged[f"rollout/tool_{name}"] for name in ("calls", "errors", "users")] == [1.5, 0.5, 0.5]
    assert logged["rollout/turns"] == 1.5
    rows = store.read(tmp_path / "r.jsonl")
    trained = [t for i, row in enumerate(rows) for t in chat.to_trajectories(policy, row, index=i, turns="assistant")]
    [batch] = pack(trained[:1], 4096, turns="assistant")
    assert policy.tokenizer.decode(batch.targets[batch.targets != -100]) == "".join(line + END for line in CALLS)
    assert "tool\n240" in policy.tokenizer.decode(batch.input_ids)
    before = policy.hash()
    config = parse({"name": "t", "train": {"lr": 1e-3, "turns": "assistant"}}).train
    stats = train(load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=2), trained, config, seed=0)
    assert stats.trained_tokens == sum(sum(row["loss_mask"]) for row in rows)
    assert stats.losses[0] > 0
    assert policy.hash() == before


class Untrained(WordTask):
    """Half of the trajectories are right: those of even index, whatever they say."""

    def verify_many(self, pairs):
        return [number % 2 == 0 for number, _ in enumerate(pairs)]


def online_config(folder, **rollout):
    rollout = {"n": 2, "turns": 2, "max_new_tokens": 64, "tool": "calculator", **rollout}
    made = quarters(folder, rollout=rollout, train={"max_tokens": 1024, "max_length": 1024})
    settings = {
        "algorithm": "drift",
        "steps": 2,
        "prompts": 2,
        "curriculum": {"warmup_steps": 0, "transition_steps": 0},
    }
    return parse({**made.model_dump(mode="json"), "online": settings, "seeds": [0]})


class Keeps(Track):
    def __init__(self):
        super().__init__(None, progress=False)
        self.rows = []

    def log(self, step, **metrics):
        self.rows.append({name.removeprefix("online/"): value for name, value in metrics.items()})


def test_online_training_with_a_calculator(tmp_path):
    made, track = online_config(tmp_path), Keeps()
    policy = load_policy(made.model, seed=0)
    lines = ["<tool_call>6 * 7</tool_call>", say("x"), "<tool_call>1/0</tool_call>", say("y"), say("z")]
    engine, task = ScriptedEngine(policy, {asked(n): lines for n in range(2)}), Untrained(2)
    before = policy.hash()
    options = {"seed": 0, "track": track, "rollouts": tmp_path / "r.jsonl"}
    stats = online.train_online(policy, engine, task, task.problems("train"), made, **options)
    assert (stats.steps, stats.skipped) == (2, 0)
    assert policy.hash() != before
    rows = store.read(tmp_path / "r.jsonl")
    assert len(rows) == 8
    for row in rows:
        tools = [message["content"] for message in row["messages"] if message["role"] == "tool"]
        assert tools[0] == "42"
        sampled = [token for token, on in zip(row["token_ids"], row["loss_mask"]) if on]
        spoken = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert policy.tokenizer.decode(sampled) == "".join(line + END for line in spoken)
    calls = sum(row["tool_calls"] for row in rows)
    assert sum(measured["tool_calls"] for measured in track.rows) * 4 == calls > 8
    assert sum(measured["turns"] for measured in track.rows) * 4 == sum(len(row["verifier"]) for row in rows)
    assert any(row["had_teacher"] for row in rows)


class Guess:
    """Says higher or lower; pays for being close, and the opening is not the problem's."""

    def reset(self, problem):
        return [{"role": "system", "content": "Guess."}, {"role": "user", "content": problem.prompt}]

    def step(self, episodes):
        right = [e.problem.answer in e.reply for e in episodes]
        higher = Step([{"role": "user", "content": "Higher."}], reward=0.25)
        return [Step(reward=1.0, done=True) if found else higher for found in right]


def test_an_environment_of_ones_own(policy, tmp_path):
    lines = {"q0": ["no", "a0"], "q1": ["no", "nor", "never"]}
    settings = SETTINGS.model_copy(update={"tool": None})
    solved, never = scripted(policy, lines, settings, environment=Guess())
    assert [m["content"] for m in solved["messages"]] == ["Guess.", "q0", "no", "Higher.", "a0"]
    assert solved["turn_rewards"] == {"t1": 0.25, "t2": 1.0}
    assert (solved["t_star"], solved["answer_norms"], solved["format_penalty"]) == (2, [], 0.0)
    assert trajectory_return(never) == pytest.approx(0.25 * (1 + 0.9 + 0.81))
    assert never["verifier"] == {"t1": 0, "t2": 0, "t3": 0}
    made, track = online_config(tmp_path, tool=None, turns=3), Keeps()
    learner, task = load_policy(made.model, seed=0), WordTask(2)
    engine = ScriptedEngine(learner, lines)
    options = {"seed": 0, "track": track, "environment": Guess()}
    stats = online.train_online(learner, engine, task, task.problems("train"), made, **options)
    assert stats.skipped == 0
    assert [row["unparsed"] for row in track.rows] == [0, 0]
    assert [row["tool_calls"] for row in track.rows] == [0, 0]
    assert stats.rewards == pytest.approx([(0.25 + 0.9 + 0.25 * 2.71) / 2] * 2)


def test_environments_that_nobody_can_go_on_from(policy):
    class Says:
        def __init__(self, *steps):
            self.steps = list(steps)

        def reset(self, problem):
            return [{"role": "user", "content": problem.prompt}]

        def step(self, episodes):
            return self.steps

    settings = SETTINGS.model_copy(update={"tool": None, "tool_calls": 2})
    said = {"role": "tool", "content": "1"}
    for steps, complaint in (
        ([], "0 steps for 1 episodes"),
        ([Step()], "not done and has no messages"),
        ([Step([said], tool_calls=1, reward=1.0)], "has no reward"),
        ([Step(tool_calls=1, done=True)], "ends no episode"),
        ([Step([{"role": "assistant", "content": "1"}, said])], "other roles than assistant"),
        ([Step([said], reward=float("nan"))], "finite reward"),
    ):
        with pytest.raises(ValueError, match=complaint):
            scripted(policy, {"q0": ["x"] * 9}, settings, environment=Says(*steps))
    [row] = scripted(policy, {"q0": ["x"] * 9}, settings, environment=Says(Step([said], tool_calls=1)))
    assert (row["tool_calls"], row["verifier"], row["t_star"]) == (5, {}, None)  # turns + tool_calls, and no more
    assert row["messages"][-1]["role"] == "assistant"


def test_verification_stays_one_call_a_turn(policy):
    class Counts(WordTask):
        sizes = ()

        def verify_many(self, pairs):
            self.sizes = (*self.sizes, len(pairs))
            return super().verify_many(pairs)

    task = Counts(3)
    environment = ToolEnvironment(task, 3)
    episodes = [Episode(problem, 0, environment.reset(problem)) for problem in task.made]
    for episode, line in zip(episodes, [say("a0"), "<tool_call>1 + 1</tool_call>", say("x")]):
        episode.messages.append({"role": "assistant", "content": line})
    right, call, wrong = environment.step(episodes)
    assert task.sizes == (2,)
    assert right == Step(reward=1.0, done=True, answer="a0")
    assert call == Step([{"role": "tool", "content": "2"}], tool_calls=1)
    assert wrong == Step([{"role": "user", "content": FEEDBACK}], answer="x")
    full = VerifyEnvironment(task, 3, "full", parse=lambda reply, tag: None)
    [step] = full.step(episodes[:1])
    assert step == Step([{"role": "user", "content": Feedback("full", 3)(task.made[0], 1, parsed=False)}], answer=None)


# Families' ways to show a tool's words, with the end of turn that this tokenizer has.
LLAMA = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SILENT = (
    "{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "shown"), [(LLAMA, 'ipython<|end_header_id|>\n\n"240"'), (QWEN, "<tool_response>\n240\n")]
)
def test_templates_that_show_tool_messages(template, shown):
    policy = load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=2)
    policy.tokenizer.chat_template = template
    lines = ["<tool_call>15 * 16</tool_call>", say("a0")]

    class Says(ScriptedEngine):
        def generate(self, prompts, **settings):
            self.prompts.append(prompts)
            ids = [chat.encode(self.policy.tokenizer, lines[len(self.prompts) - 1] + END) for _ in prompts]
            return [Sample(i, [-1.0] * len(i), True) for i in ids]

    engine, task = Says(policy, {}), WordTask(1)
    [episode] = play(policy, engine, task, [(task.made[0], 0)], SETTINGS, seed=[0])
    row = store.validate(episode.row(-0.1))
    assert row["t_star"] == 1
    assert shown in policy.tokenizer.decode(row["token_ids"])
    sampled = [token for token, on in zip(row["token_ids"], row["loss_mask"]) if on]
    assert policy.tokenizer.decode(sampled) == "".join(line + END for line in lines)


@pytest.mark.parametrize(
    ("template", "why"), [(GEMMA, "says 'Conversation roles must alternate'"), (SILENT, "leaves it out")]
)
def test_templates_that_do_not_are_refused_in_words(template, why):
    policy = load_policy(ModelConfig(hidden_size=16, layers=1, heads=2), seed=2)
    policy.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"cannot show a message of role 'tool': it {why}"):
        scripted(policy, {asked(0): CALLS})


def test_settings():
    with pytest.raises(ConfigError, match=r"rollout\.tool"):
        parse({"name": "q", "rollout": {"tool": "abacus"}})
    assert parse({"name": "q", "rollout": {"tool": "calculator"}}).rollout.tool_calls == 8


def test_the_example_runs():
    assert doctest.testmod(environments) == doctest.TestResults(failed=0, attempted=2)
