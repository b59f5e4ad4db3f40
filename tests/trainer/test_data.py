"""Problems from files and data sets of others' shapes: columns, templates, messages, splits, and complaints all at once."""

from __future__ import annotations

import json

import pytest

from drift.config import Config, ConfigError, TaskConfig, parse
from drift.jobs.work import prepare
from drift.rollouts.environments import VerifyEnvironment
from drift.tasks import TaskError, load_task

ROWS = [{"question": f"What is {n} and {n}?", "target": str(2 * n), "level": n} for n in range(1, 41)]
MAPPED = {"columns": {"prompt": "question", "answer": "target"}}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module", params=["jsonl", "parquet", "dataset"])
def source(request, tmp_path_factory):
    """The same rows in each form that can be read."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "jsonl":
        return {"kind": "jsonl", "path": jsonl(folder / "rows.jsonl", ROWS)}
    import pyarrow
    import pyarrow.parquet

    name = folder / ("rows.parquet" if request.param == "parquet" else "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), name)
    return {"kind": request.param, "path": str(name if request.param == "parquet" else folder)}


def test_rows_of_other_columns_are_read_alike_from_jsonl_parquet_and_a_data_set(source):
    task = load_task(TaskConfig(**source, **MAPPED, warm_share=0.0))
    train, held_out = task.problems("train"), task.problems("eval")
    assert len(train) + len(held_out) == 40
    assert held_out
    assert {(p.prompt, p.answer) for p in train + held_out} == {(r["question"], r["target"]) for r in ROWS}
    assert {p.metadata["level"] for p in train + held_out} == set(range(1, 41))


def test_a_template_makes_the_prompt_of_several_columns(source):
    task = load_task(
        TaskConfig(**source, columns={"answer": "target"}, template="Level {level}: {question}", warm_share=0.0)
    )
    assert "Level 3: What is 3 and 3?" in {p.prompt for p in task.problems("train") + task.problems("eval")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"columns": {"prompt": "nope", "answer": "target"}},
            "columns.prompt names the column 'nope', and the row has",
        ),
        ({"template": "{nope}", "columns": {"answer": "target"}}, "template names the column 'nope'"),
        ({}, r"'prompt' is missing; the row has 'question'.*task.columns=\{prompt: THEIR_NAME\}"),
    ],
)
def test_a_column_that_is_not_there_is_named(source, settings, words):
    with pytest.raises(TaskError, match=words):
        load_task(TaskConfig(**source, **settings))


def test_a_data_set_that_cannot_be_loaded_says_which(tmp_path):
    with pytest.raises(TaskError, match=r"split train cannot be loaded.*check the name or the folder"):
        load_task(TaskConfig(kind="dataset", path=str(tmp_path / "none")))


def test_a_conversation_as_prompt_keeps_its_earlier_turns_and_its_system_message(tmp_path):
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "1 + 1?"},
    ]
    for key in ("prompt", "messages"):
        path = jsonl(tmp_path / f"{key}.jsonl", [{key: said, "answer": 2}])
        task = load_task(TaskConfig(kind="jsonl", path=path, instruction="Think.", warm_share=0.0, eval_share=0.0))
        [problem] = task.problems("train")
        assert VerifyEnvironment(task, 3).reset(problem) == [*said[:3], {"role": "user", "content": "Think.\n\n1 + 1?"}]
    bad = jsonl(tmp_path / "bad.jsonl", [{"prompt": said[:3], "answer": 2}])
    with pytest.raises(TaskError, match="must end with user"):
        load_task(TaskConfig(kind="jsonl", path=bad))


def test_a_null_system_is_the_tasks_and_a_rows_own_replaces_it(tmp_path):
    rows = [{"prompt": "a", "answer": 1, "system": None}, {"prompt": "b", "answer": 1, "system": "own"}]
    config = TaskConfig(kind="jsonl", path=jsonl(tmp_path / "s.jsonl", rows), system="all", warm_share=0, eval_share=0)
    assert [p.system for p in load_task(config).problems("train")] == ["all", "own"]


def test_with_a_model_of_its_own_nothing_is_kept_back_for_a_warm_start(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{"prompt": r["question"], "answer": r["target"]} for r in ROWS])
    task = {"kind": "jsonl", "path": path}
    work = prepare(parse({"name": "x", "model": {"path": "some/model"}, "task": task}))
    assert len(work.task.problems("train")) + len(work.task.problems("eval")) == 40
    assert not work.task.problems("warm")
    everything = parse({"name": "x", "model": {"path": "m"}, "task": task | {"eval_share": 0.0}, "eval": sets(path)})
    assert len(prepare(everything).task.problems("train")) == 40


def sets(*paths, **more):
    return {"sets": [{"name": f"set-{n}", "path": path, **more} for n, path in enumerate(paths)]}


def test_all_complaints_come_at_once(tmp_path):
    good = jsonl(tmp_path / "good.jsonl", [{"prompt": "1 + 1", "answer": 2}])
    bad = jsonl(tmp_path / "bad.jsonl", [{"prompt": "x"}, {"answer": 1}])
    config = {"name": "x", "model": {"path": "m"}, "task": {"kind": "jsonl", "path": good, "train_problems": 9}}
    config |= {"eval": sets(bad, str(tmp_path / "gone.jsonl"))}
    with pytest.raises(TaskError) as caught:
        prepare(parse(config))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "eval.sets, 'set-0': " in lines[0]
    assert "bad.jsonl:1: 'answer' is missing" in lines[0]
    assert "bad.jsonl:2: 'prompt' is missing" in lines[1]
    assert "'set-1'" in lines[2]
    assert "is not a file" in lines[2]
    assert "task.train_problems=9" in lines[3]
    assert "holds 1 distinct problems for this split (1 train)" in lines[3]


def test_an_evaluation_set_has_its_own_scorer_instruction_and_columns(tmp_path):
    path = jsonl(tmp_path / "choice.jsonl", [{"q": "Which?", "a": "B"}, {"q": "What?", "a": "C"}])
    own = {"scorer": "choice", "instruction": "Choose.", "columns": {"prompt": "q", "answer": "a"}, "format_rule": ""}
    config = {"name": "x", "model": {"path": "m"}, "task": {"scorer": "exact"}, "eval": sets(path, **own)}
    [(task, problems)] = prepare(parse(config)).evaluations.values()
    assert [p.prompt for p in problems] == ["Choose.\n\nWhich?", "Choose.\n\nWhat?"]
    assert task.verify(problems[0], "(B)")


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"columns": {"promt": "x"}}, "keys must be among prompt"),
        ({"template": "{a}", "columns": {"prompt": "x"}}, "leave one of them out"),
        ({"eval_share": 0.7, "warm_share": 0.4}, "must be below 1"),
        ({"kind": "parquet"}, "path should name the Parquet file"),
    ],
)
def test_contradictions_are_refused(task, words):
    with pytest.raises(ConfigError, match=words):
        parse({"name": "x", "task": task})


def test_names_of_evaluation_sets_differ():
    with pytest.raises(ConfigError, match="must differ"):
        parse({"name": "x", "eval": {"sets": [{"name": "a", "path": "p"}, {"name": "a", "path": "q"}]}})
    assert isinstance(parse({"name": "x", "eval": sets("p", "q")}), Config)
