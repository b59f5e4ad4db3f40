"""The papers' configs hold the published numbers and resolve; `drift data` reads rows of the published sets' shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drift.config import TaskConfig, load
from drift.data import SETS, convert
from drift.jobs.commands import data, overrides
from drift.rollouts.environments import VerifyEnvironment
from drift.tasks import TaskError, load_task
from drift.tasks.parsing import PARSERS

PAPERS = Path(__file__).parents[2] / "configs" / "papers"
A = ["a-qwen2.5-3b", "a-qwen2.5-7b", "a-llama3.1-8b"]
B = ["b-qwen3-8b-sciknoweval", "b-qwen3-8b-tooluse"]


def test_every_config_of_a_paper_is_checked_here():
    assert sorted(path.stem for path in PAPERS.glob("*.yaml")) == sorted(A + B)


@pytest.mark.parametrize("name", A)
def test_method_a_has_the_numbers_of_the_public_scripts(name):
    config = load(PAPERS / f"{name}.yaml")
    assert config.name == name
    how, train, task = config.rollout, config.train, config.task
    assert (how.n, how.turns, how.temperature, how.top_p, how.max_new_tokens) == (16, 5, 1.0, 1.0, 512)
    assert (how.feedback, how.format_penalty) == ("full", -0.1)
    assert (config.weights.beta, config.weights.gamma, config.weights.repetition) == (0.1, 0.9, 0.5)
    assert (train.lr, train.schedule, train.warmup_ratio, train.weight_decay) == (5e-6, "constant", 0.1, 0.1)
    assert (train.grad_clip, train.epochs, train.batch_size, train.longest) == (1.0, 1, 128, 8704)
    assert (train.turns, train.normalize, train.token_reduction) == ("last", "samples", "mean")
    assert (task.train_problems, task.duplicates, task.scorer, task.parser) == (1800, "keep", "exact", "strict")
    assert (task.prefill, task.system) == ("<think>", "You're a helpful assistant. ")
    assert (config.eval.turns, config.eval.feedback, config.eval.max_new_tokens) == (5, "simple", 1024)
    names = ["math-500", "theoremqa", "gpqa", "mmlu-redux", "hendrycks-math", "mmlu-pro"]
    assert [one.name for one in config.eval.sets] == names
    for one in config.eval.sets:
        published = SETS[one.name]
        scorer = "exact" if published.scorer == "math" else published.scorer  # the public check is of text
        assert (one.scorer, one.instruction) == (scorer, published.instruction)
    assert not config.warm_start.enabled


@pytest.mark.parametrize("name", B)
def test_method_b_has_the_published_numbers(name):
    config = load(PAPERS / f"{name}.yaml")
    how, train, online = config.rollout, config.train, config.online
    assert (config.name, config.model.path) == (name, "Qwen/Qwen3-8B")
    assert config.model.chat_template_kwargs == {"enable_thinking": False}
    assert (how.n, how.turns, how.max_new_tokens, how.format_penalty) == (8, 1, 8192, 0.0)
    assert (train.lr, train.warmup_steps, train.schedule, train.weight_decay) == (1e-5, 10, "constant", 0.01)
    assert (online.algorithm, online.prompts, online.clip_low, online.clip_high) == ("drift", 32, 0.2, 0.28)
    assert (online.teacher.rate, online.teacher.feedback, online.teacher.max_prompt_tokens) == (0.05, "off", 10240)
    assert (online.distill.alpha, online.distill.top_k, online.sampler_clip) == (0.5, 100, 2.0)
    assert (config.eval.samples, config.eval.temperature, config.eval.top_p) == (16, 0.6, 0.95)
    published = SETS[name.removeprefix("b-qwen3-8b-")]
    assert (config.task.scorer, config.task.parser) == (published.scorer, published.parser or "lenient")


def test_the_first_message_of_method_a_is_the_published_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1?", "answer": "2", "split": "train"}) + "\n")
    task = load(PAPERS / f"{A[0]}.yaml").task.model_copy(update={"path": str(path), "train_problems": 1})
    loaded = load_task(task)
    system, user = VerifyEnvironment(loaded, 5).reset(loaded.problems("train")[0])
    assert system["content"] == "You're a helpful assistant. "
    assert user["content"] == (
        "You are solving Math problems. Only give the final answer between <answer> and </answer>.\nTurn 1:\nState:\n"
        "1 + 1?\nYou have 5 actions left. Always output: <think> [Your thoughts] </think> <answer> [your answer] </answer> "
        "with no extra text. Strictly follow this format. Max response length: 400 words (tokens).\n"
    )


# --- drift data ---

QA = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 1}
TOOLS = [{"Action": "add", "Action_Input": '{"a": 1}'}]
SHAPES = {  # set: (a row as published, our prompt, our answer)
    "metamathqa": ({"type": "MATH_AnsAug", "query": "1+1?", "response": "So.\nThe answer is: 2"}, "1+1?", "2"),
    "math-500": ({"problem": "1/2+1/2?", "solution": "…", "answer": r"\frac{2}{2}"}, "1/2+1/2?", r"\frac{2}{2}"),
    "theoremqa": ({"Question": "Is it?", "Answer": "True", "Answer_type": "bool", "Picture": None}, "Is it?", "True"),
    "mmlu-redux": (QA, "Which?\nA. w\nB. x\nC. y\nD. z", "B"),
    "hendrycks-math": ({"problem": "x?", "solution": r"so \boxed{\frac{1}{2}}."}, "x?", r"\frac{1}{2}"),
    "mmlu-pro": (
        {"question": "Which?", "options": [*"abcdefghij"], "answer": "J", "answer_index": 9},
        "Which?\n" + "\n".join(f"{a}. {b}" for a, b in zip("ABCDEFGHIJ", "abcdefghij")),
        "J",
    ),
    "sciknoweval": (
        {"prompt": "What?\n\nA: 1\nB: 2", "answer": "A", "system": "\nselect", "kind": "mcq", "idx": 4},
        "What?\n\nA: 1\nB: 2",
        "A",
    ),
    "tooluse": ({"prompt": "Use.", "answer": json.dumps(TOOLS), "system": None}, "Use.", json.dumps(TOOLS)),
}
GPQA = {"Question": "Which?", "Correct Answer": "r", **{f"Incorrect Answer {n}": f"w{n}" for n in (1, 2, 3)}}


def converted(folder, name, *rows, file="test.jsonl", **options):
    (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = convert(name, folder / "out" / "ours.jsonl", str(folder / file), **options)
    return done, [json.loads(line) for line in (folder / "out" / "ours.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_each_published_shape(tmp_path, name):
    row, prompt, answer = SHAPES[name]
    _, [ours] = converted(tmp_path, name, row)
    assert (ours["prompt"], ours["answer"]) == (prompt, answer)
    assert ours.get("system") == row.get("system")


def test_options_of_gpqa_are_shuffled_by_the_question_and_the_letter_follows(tmp_path):
    rows = [{**GPQA, "Question": f"Which {n}?"} for n in range(12)]
    _, made = converted(tmp_path, "gpqa", *rows)
    assert len({row["answer"] for row in made}) > 1
    for row in made:
        assert f"\n{row['answer']}. r" in row["prompt"]
    assert converted(tmp_path, "gpqa", *rows)[1] == made


def test_what_a_set_leaves_out_is_counted(tmp_path):
    row = SHAPES["metamathqa"][0]
    done, made = converted(tmp_path, "metamathqa", row, {**row, "type": "GSM_SV"}, file="train.jsonl")
    assert len(made) == 1
    assert dict(done.skipped) == {"type GSM_SV": 1}
    assert made[0]["split"] == "train"


def test_rows_of_another_shape_are_all_named(tmp_path):
    with pytest.raises(TaskError, match=r"test.jsonl:1: the column 'problem' is missing(.|\n)*test.jsonl:2: neither"):
        converted(tmp_path, "math-500", {"answer": "1"}, {"problem": "x"})
    with pytest.raises(TaskError, match="names none of 4 options"):
        converted(tmp_path, "mmlu-redux", {**QA, "answer": 4})
    assert not (tmp_path / "out").exists()


def test_a_leak_between_train_and_test_is_a_warning_that_names_the_rows(tmp_path):
    row = SHAPES["sciknoweval"][0]
    for file, rows in (("train.json", [{**row, "prompt": "other"}, row]), ("test.json", [row])):
        (tmp_path / file).write_text("".join(json.dumps(one) + "\n" for one in rows))
    text, [warning] = data("sciknoweval", str(tmp_path), tmp_path / "ours.jsonl", limit=None, shuffle=None)
    assert warning.endswith(f"test.json:1 asks the same as {tmp_path}/train.json:2, which is in train")
    assert "2 train, 1 eval" in text
    task = load_task(TaskConfig(kind="jsonl", path=str(tmp_path / "ours.jsonl"), scorer="choice"))
    assert (len(task.problems("train")), len(task.problems("eval"))) == (2, 1)


def test_shuffled_and_limited(tmp_path):
    rows = [{**SHAPES["math-500"][0], "problem": str(n)} for n in range(20)]
    _, made = converted(tmp_path, "math-500", *rows, limit=5, seed=42)
    assert len(made) == 5
    assert [row["prompt"] for row in made] != [str(n) for n in range(5)]


@pytest.mark.parametrize("name", SETS)
def test_the_settings_that_are_printed_read_the_set(name):
    said = overrides(name, Path("x.jsonl"))
    assert f"task.scorer={SETS[name].scorer}" in said


def test_tool_calls_are_scored_from_a_reply_without_an_answer_tag(tmp_path):
    converted(tmp_path, "tooluse", SHAPES["tooluse"][0])
    path = str(tmp_path / "out" / "ours.jsonl")
    task = load_task(TaskConfig(kind="jsonl", path=path, scorer="tools", parser="whole"))
    reply = 'Thought: <think>x</think>add.\nAction: add\nAction Input: {"a": 1}'
    assert task.verify(task.problems("eval")[0], PARSERS["whole"](reply, "answer"))
    assert not task.verify(task.problems("eval")[0], PARSERS["whole"]("Action: sub", "answer"))
