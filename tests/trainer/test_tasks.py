"""Splits that share nothing, symmetric forms included, and verifiers that neither raise nor hang."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drift.config import TaskConfig
from drift.tasks import SPLITS, TaskError, canonical, load_task, normalise, problem_id, split_of

TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}


def signed_terms(question: str) -> frozenset[tuple[int, int]]:
    """The sum's terms as a multiset, by other means than the code under test."""
    numbers = re.search(r"problem: (.*) =", question).group(1).replace("- ", "-").replace("+ ", "").split()
    return frozenset((value, numbers.count(value)) for value in numbers)


def test_splits_share_no_problem_in_any_order_of_terms():
    task = load_task(TaskConfig(options=TWO_DIGITS, warm_problems=2000, train_problems=500, eval_problems=1000))
    questions = {split: [problem.prompt for problem in task.problems(split)] for split in SPLITS}
    assert [len(set(questions[split])) for split in SPLITS] == [2000, 500, 1000]
    sums = {split: {signed_terms(question) for question in questions[split]} for split in SPLITS}
    assert [len(sums[split]) for split in SPLITS] == [2000, 500, 1000]  # no mirrored pair inside a split either
    for one, other in itertools.combinations(SPLITS, 2):
        assert not sums[one] & sums[other]
        assert not {p.id for p in task.problems(one)} & {p.id for p in task.problems(other)}


def test_problems_repeat_and_differ_by_seed():
    config = TaskConfig(options=TWO_DIGITS, train_problems=50)
    again, other = load_task(config), load_task(config.model_copy(update={"seed": 1}))
    assert load_task(config).problems("train") == again.problems("train")
    assert again.problems("train") != other.problems("train")


def test_split_does_not_depend_on_the_sizes_asked_for():
    small = load_task(TaskConfig(options=TWO_DIGITS, train_problems=20)).problems("train")
    large = load_task(TaskConfig(options=TWO_DIGITS, train_problems=90)).problems("train")
    assert small == large[:20]


@given(st.lists(st.tuples(st.sampled_from("+-"), st.integers(0, 99)), min_size=2, max_size=5), st.randoms())
def test_canonical_does_not_see_the_order_of_terms(terms: list[tuple[str, int]], shuffler: random.Random):
    def text(terms: list[tuple[str, int]]) -> str:
        first, rest = terms[0], terms[1:]
        return f"Compute {'-' if first[0] == '-' else ''}{first[1]} " + " ".join(f"{s} {n}" for s, n in rest) + " ="

    shuffled = terms[:]
    shuffler.shuffle(shuffled)
    assert canonical(text(terms)) == canonical(text(shuffled))
    changed = [*terms[:-1], (terms[-1][0], terms[-1][1] + 1)]
    assert canonical(text(terms)) != canonical(text(changed))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("3 * 4 + 25", "25+4*3", True),
        ("12 - 3", "-3 + 12", True),
        ("What is 3 + 4?", "what is  4+3?", True),
        ("It is 1999. 5 × 3", "It is 1999. 3 * 5", True),
        ("12 - 3", "3 - 12", False),
        ("(1 + 2) * 3", "(1 + 3) * 2", False),
        ("8 / 2 + 1", "1 + 8 / 4", False),
        ("x - 5 + 3", "x - 3 + 5", False),
    ],
)
def test_canonical_cases(one: str, other: str, same: bool):
    assert (canonical(one) == canonical(other)) is same


def test_generator_with_too_few_problems_says_so():
    task = load_task(TaskConfig(options={**TWO_DIGITS, "min_digits": 1, "max_digits": 1}, eval_problems=1000))
    with pytest.raises(TaskError, match=r"task\.eval_problems=1000.*only \d+ distinct.*widen"):
        task.problems("eval")


def test_unknown_generator_and_option_name_the_setting():
    with pytest.raises(TaskError, match=r"task\.name='chain_sums' is no reasoning-gym generator"):
        load_task(TaskConfig(name="chain_sums"))
    with pytest.raises(TaskError, match=r"task\.options=.*'min_term'"):
        load_task(TaskConfig(options={"min_term": 2}))


def test_right_is_full_score_only_and_a_raising_scorer_is_wrong():
    task = load_task(TaskConfig(name="spell_backward", train_problems=5))
    problem = task.problems("train")[0]
    assert task.verify(problem, f"  {problem.answer}\n")
    assert not task.verify(problem, problem.answer + "x")
    assert not task.verify(problem, "")
    primes = load_task(TaskConfig(name="prime_factorization", train_problems=5))
    assert primes.verify_many([(primes.problems("train")[0], text) for text in ("no idea", "2 × many")]) == [
        0.0,
        0.0,
    ]
    assert primes.scorer.sandbox.raised > 0


def test_generators_without_a_single_gold_answer_load():
    task = load_task(TaskConfig(name="propositional_logic", train_problems=3))
    example = task.problems("train")[0].metadata["metadata"]["example_answer"]
    assert task.verify(task.problems("train")[0], example)


def test_normalise():
    assert normalise("  The  Answer\tIS\n4 ") == "theansweris4"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_splits_are_disjoint_with_symmetric_forms(tmp_path):
    rows = [{"prompt": f"Find {a} + {b}", "answer": str(a + b)} for a in range(40) for b in range(40)]
    config = TaskConfig(
        kind="jsonl", path=jsonl(tmp_path / "a.jsonl", rows), warm_problems=200, train_problems=200, eval_problems=200
    )
    task = load_task(config)
    keys = {
        split: {tuple(sorted(p.prompt.removeprefix("Find ").split(" + "))) for p in task.problems(split)}
        for split in SPLITS
    }
    assert [len(task.problems(split)) for split in SPLITS] == [200, 200, 200]
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]
    with pytest.raises(TaskError, match=r"task\.train_problems=5000: .* holds \d+ distinct"):
        load_task(config.model_copy(update={"train_problems": 5000})).problems("train")
    task.close()


def test_jsonl_named_splits_and_bad_rows(tmp_path, caplog):
    def load(*rows):
        path = jsonl(tmp_path / "b.jsonl", rows)
        return load_task(TaskConfig(kind="jsonl", path=path, warm_problems=0, train_problems=1, eval_problems=1))

    home = split_of(canonical("1 + 2"))
    away = next(split for split in ("train", "eval") if split != home)
    task = load({"prompt": "1 + 2", "answer": 3, "split": away})
    assert [problem.answer for problem in task.problems(away)] == ["3"]
    load({"prompt": "1 + 2", "answer": 3, "split": "train"}, {"prompt": "2 + 1", "answer": 3, "split": "eval"})
    assert re.search(
        r"b\.jsonl:2: this problem looks like the one at \S+b\.jsonl:1, which is in split 'train'", caplog.text
    )
    with pytest.raises(TaskError, match=r"b\.jsonl:1: 'answer' is missing; the row has 'prompt'"):
        load({"prompt": "1 + 2"})
    with pytest.raises(TaskError, match=r"b\.jsonl:1: 'split' is 'test'"):
        load({"prompt": "1 + 2", "answer": 3, "split": "test"})
    one, named = {"prompt": "1 + 2", "answer": 3}, {"prompt": "5 + 6", "answer": 11, "split": "eval"}
    for rows, word in (((one, named), "there"), ((named, one), "missing")):
        with pytest.raises(TaskError, match=rf"b\.jsonl:2: 'split' is {word}, unlike above; all rows say it, or none"):
            load(*rows)
    for name in ("prompt", "answer"):
        with pytest.raises(TaskError, match=rf"b\.jsonl:1: '{name}' is .* half a character"):
            load({**one, name: "\ud800"})
    for content in (b'{"prompt": "1', '{"prompt": "größe", "answer": 1}'.encode("latin-1"), b"[" * 100_000):
        (tmp_path / "c.jsonl").write_bytes(content)
        with pytest.raises(TaskError, match=r"c\.jsonl:1: not JSON"):
            load_task(TaskConfig(kind="jsonl", path=str(tmp_path / "c.jsonl")))
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(named).encode() + b"\r\n")
    task = load_task(TaskConfig(kind="jsonl", path=str(tmp_path / "c.jsonl"), eval_problems=1))
    assert [problem.prompt for problem in task.problems("eval")] == ["5 + 6"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("Which weekday is 2024-05-06?", "Monday"), ("Which weekday is 2024-06-05?", "Wednesday")),
        (("How long is the month of 2024-05-10?", 31), ("How long is the month of 2024-10-05?", 31)),
        (("ASCII code of a?", 97), ("ASCII code of A?", 65)),
        (("Call 555-12-34", "ok"), ("Call 555-34-12", "ok")),
        (("a\nb", 1), ("a b", 1)),
        (("Half of 1?", "1/2"), ("Half of 1?", "0.5")),
    ],
)
def test_problems_that_differ_in_text_or_answer_are_all_kept(tmp_path, one, other):
    rows = [{"prompt": text, "answer": answer, "split": "train"} for text, answer in (one, other)]
    config = TaskConfig(kind="jsonl", path=jsonl(tmp_path / "d.jsonl", rows), warm_problems=0, train_problems=2)
    assert len({problem.id for problem in load_task(config).problems("train")}) == 2


def test_equal_rows_count_once_or_are_groups_of_their_own_by_choice(tmp_path):
    rows = [{"prompt": text, "answer": 1, "split": "train"} for text in ("caf\u00e9?", "cafe\u0301?", " caf\u00e9?\n")]
    config = TaskConfig(kind="jsonl", path=jsonl(tmp_path / "d.jsonl", rows), warm_problems=0, train_problems=1)
    with pytest.raises(TaskError, match=r"holds 1 distinct"):
        load_task(config.model_copy(update={"train_problems": 2})).problems("train")
    kept = load_task(config.model_copy(update={"train_problems": 3, "duplicates": "keep"})).problems("train")
    names = [problem.id for problem in kept]
    assert names[1:] == [f"{names[0]}-1", f"{names[0]}-2"]


def test_a_corrected_answer_changes_the_second_part_of_the_id_alone():
    before, after = problem_id("2 + 2?", "5"), problem_id("2 + 2?", "4")
    assert before != after
    assert before.partition("-")[0] == after.partition("-")[0]


def test_a_problem_is_put_with_system_message_instruction_and_format_rule(tmp_path):
    rows = [{"prompt": "1 + 1?", "answer": 2, "split": "train"}]
    rows += [{"prompt": "q", "answer": 1, "split": "train", "system": "Be brief."}]
    words = {"system": "You solve.", "instruction": "Solve:", "format_rule": "Use tags."}
    config = TaskConfig(kind="jsonl", path=jsonl(tmp_path / "d.jsonl", rows), train_problems=2, **words)
    first, second = load_task(config).problems("train")
    assert (first.prompt, first.system) == ("Solve:\n\n1 + 1?\n\nUse tags.", "You solve.")
    assert second.system == "Be brief."
    bare = config.model_copy(update={"system": None, "instruction": None, "format_rule": None})
    first, _ = load_task(bare).problems("train")
    assert (first.prompt, first.system) == ("1 + 1?", None)
