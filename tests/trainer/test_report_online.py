"""The page of an online run: its sections, its heat maps, and what is left of them where files are missing or broken."""

import json
import math
import re

import pytest
from fake_online_run import STEPS, make_online_run
from fake_run import write_lines
from test_report import ATTACK, Parsed, page_of, text_of

from drift.report import online, online_files
from drift.report.online_files import Asked, by_difficulty
from drift.report.records import read


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_online_run(tmp_path_factory.mktemp("runs") / "online")


@pytest.fixture(scope="module")
def page(finished):
    return page_of(finished)


FIGURES = (
    "Reward",
    "Solved",
    "Pass rate by difficulty",
    "How hard the router finds them",
    "Entropy",
    "KL, policy against base and teacher",
    "pass@k of a step’s groups",
    "Repeat rate",
    "Samples by branch",
    "Mean weight of each branch",
    "Teacher coverage",
    "Success buffer",
    "Gate and bonus",
    "Samples without an advantage",
)


def figures_of(page):
    return dict(re.findall(r'<svg [^>]*aria-label="([^"]+)"[^>]*>(.*?)</svg>', page, flags=re.DOTALL))


def test_every_figure_is_there_and_curves_are_drawn_once(page):
    drawn = re.findall(r'aria-label="([^"]+)"', page)
    assert [name for name in FIGURES if drawn.count(name) != 1] == []
    others = [name for name in drawn if name not in FIGURES]
    assert {"loss", "seconds_sampling", "buffer/added", "difference/mean"} <= set(others)
    assert not {"reward", "router/teacher", "watch/pass_at_1", "curriculum/phase"} & set(others)
    assert len(drawn) == len(set(drawn))


def test_phases_are_named_where_they_were(page):
    for name in FIGURES:
        assert (">warm-up<" in figures_of(page)[name], ">transition<" in figures_of(page)[name]) == (True, True), name
    assert ">warm-up<" not in figures_of(page)["loss"]


def test_the_page_says_what_was_trained_and_that_it_may_have_collapsed(finished, page):
    results = json.loads((finished / "summary.json").read_text())["results"]
    ours = 100 * sum(results["drift"]["multi_at_5"]) / 2
    text = text_of(page)
    assert f"Online training (drift) solves {ours:.1f} %" in text
    assert "This run may have collapsed." in text
    assert "seed-0/drift, 2 steps from 23 to 24: entropy is far below its start" in text
    assert "seed-1/drift, 4 steps from 21 to 24: many answers repeat an earlier one" in text
    assert "far less is solved" not in text


def test_held_out_problems_before_and_after(finished, page):
    before, after = (
        [
            turn
            for seed in (0, 1)
            for turn in json.loads((finished / f"seed-{seed}/eval-{arm}.json").read_text())["solved_at"]
        ]
        for arm in ("base", "drift")
    )
    text = text_of(page)
    for label, fits in (("in the first turn", (1,)), ("in a later turn", (2,)), ("never", (0,))):
        now = [b for a, b in zip(before, after) if a in fits]
        single, multi = (100 * sum(b in turns for b in now) / len(now) for turns in ((1,), (1, 2)))
        assert f"{label} {len(now)} {single:.1f} % {multi:.1f} %" in text


def test_tokens_are_coloured_by_their_values(finished, page):
    rows = [json.loads(line) for line in (finished / "seed-0/drift/examples.jsonl").read_text().splitlines()]
    maps = re.findall(r'class="heat (\w+)">(.*?)</pre>', page, flags=re.DOTALL)
    assert [name for name, _ in maps].count("gate") == 6  # two of the first, a middle and the last step
    assert [name for name, _ in maps].count("bonus") == 6
    assert "<h3>Step 3</h3>" in page
    assert "<h3>Step 12</h3>" not in page
    row = rows[0]
    for name, low, high in (("gate", 0, 1), ("bonus", 1, 2)):
        drawn = next(content for found, content in maps if found == name)
        levels = [int(level) for level in re.findall(r'<i class="h(\d+)"', drawn)]
        shown = [value for value, on in zip(row[name], row["trained"]) if on]
        assert levels == [round(10 * (value - low) / (high - low)) for value in shown]
        titles = re.findall(r'title="([^"]*)"', drawn)
        assert all(f"{name} {value:.3g}" in title for value, title in zip(shown, titles, strict=True))
        assert all(f"divergence {value:.3g}" in t for value, t in zip(filter(None, row["divergence"]), titles))
    assert "user: Incorrect." in text_of(page)
    assert page.split("Trajectories to read")[0].count(">no teacher<") == 3
    assert max(map(int, re.findall(r'class="h(\d+)"', page))) <= 10


def test_trajectories_of_the_last_step_are_shown_with_their_routes(page):
    text = text_of(page)
    assert f"From step {STEPS} of seed-0/drift/rollouts.jsonl" in text
    for words in ("A = 0.25", "pass rate 0.5", "policy 1", "rebellious 0.5", "siblings of 4"):
        assert words in text


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(page):
    tags = Parsed(page).tags
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    ids = re.findall(r'\sid="([^"]+)"', page)
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in used} <= set(ids)
    assert "nan" not in page.lower().replace("nanum", "")


def test_markup_of_models_and_data_is_escaped(tmp_path):
    folder = make_online_run(tmp_path / "run", seeds=1)
    for name in ("examples", "rollouts"):
        file = folder / "seed-0" / "drift" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["prompt_id"] += ATTACK
            if name == "examples":
                row["tokens"] = [token + ATTACK for token in row["tokens"]]
                row["solved_at"] = ATTACK
            for message in row.get("messages", []):
                message["content"] += ATTACK
        write_lines(file, rows)
    page = page_of(folder)
    parsed = Parsed(page)
    assert not {"script", "img"} & {tag for tag, _ in parsed.tags}
    assert "onerror" not in {name for _, attributes in parsed.tags for name in attributes}
    assert text_of(page).count('<script>alert("x")</script>') > 100


def test_a_run_without_stored_files_shows_its_curves(tmp_path):
    page = page_of(make_online_run(tmp_path / "run", stored=False))
    drawn = set(figures_of(page))
    assert set(FIGURES) - drawn == {"Pass rate by difficulty"}
    text = text_of(page)
    assert "token by token" not in text
    assert "Trajectories to read" not in text
    assert "Not everything is here" not in text


def test_an_algorithm_without_a_teacher_has_no_routes(tmp_path):
    page = page_of(make_online_run(tmp_path / "run", algorithm="grpo", stored=False))
    drawn = set(figures_of(page))
    assert {"Reward", "Solved", "Entropy", "Repeat rate"} <= drawn
    assert not {"Samples by branch", "Success buffer", "How hard the router finds them"} & drawn
    text = text_of(page)
    assert "Online training (grpo) solves" in text
    assert "curriculum" not in text.split("Settings")[0]
    assert "grpo ahead by" in text


def test_a_run_that_has_just_begun(tmp_path):
    folder = make_online_run(tmp_path / "run", seeds=1, stored=False)
    (folder / "summary.json").unlink()
    (folder / "seed-0" / "eval-drift.json").unlink()
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(first + "\n")
    text = text_of(page_of(folder))
    assert "one step, each" in text
    assert "summary.json: the run is not finished" in text


def test_broken_files_are_reported_not_fatal(tmp_path):
    folder = make_online_run(tmp_path / "run", seeds=1)
    inside = folder / "seed-0" / "drift"
    examples = [json.loads(line) for line in (inside / "examples.jsonl").read_text().splitlines()]
    examples[0]["gate"] = examples[0]["gate"][:3]  # too short: left out
    examples[1]["entropy"][2] = None  # was not finite
    examples[2]["trained"] = "all"
    write_lines(inside / "examples.jsonl", examples)
    with (inside / "examples.jsonl").open("a") as file:
        file.write('[1]\n{"step": "x"}\n{"step": 24, "tok')
    with (inside / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 24, "prompt_id": "a"}\n\n')
    text = text_of(page_of(folder))
    assert "seed-0/drift/examples.jsonl: 3 lines cannot be read" in text
    assert "seed-0/drift/rollouts.jsonl: 1 rows are left out" in text
    assert "token by token" in text


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    """As another program may have written them."""
    folder = make_online_run(tmp_path / "run", seeds=1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spoilt = [{key: value if key in ("step", "time") else math.nan for key, value in row.items()} for row in rows]
    write_lines(folder / "metrics.jsonl", [*spoilt[:-1], rows[-1]])
    examples = folder / "seed-0" / "drift" / "examples.jsonl"
    lines = [json.loads(line) for line in examples.read_text().splitlines()]
    write_lines(examples, [row | {"entropy": [math.nan, math.inf, *row["entropy"][2:]]} for row in lines])
    assert "token by token" in text_of(page_of(folder))
    write_lines(folder / "metrics.jsonl", spoilt)
    page_of(folder)


def test_a_step_that_was_stored_twice_counts_once(tmp_path):
    folder = make_online_run(tmp_path / "run", seeds=1)
    inside = folder / "seed-0" / "drift"
    rows = [json.loads(line) for line in (inside / "rollouts.jsonl").read_text().splitlines()]
    examples = [json.loads(line) for line in (inside / "examples.jsonl").read_text().splitlines()]
    again = [{**row, "advantage": 7.5} for row in examples if row["step"] == 24]
    write_lines(inside / "rollouts.jsonl", rows + [row for row in rows if row["step"] == 24])
    write_lines(inside / "examples.jsonl", examples + again)
    [seed] = online_files.read(read(folder))
    assert len(seed.asked) == len(rows)
    assert len(seed.last) == sum(row["step"] == 24 for row in rows)
    assert len(seed.examples) == len(examples)
    assert [row["advantage"] for row in seed.examples if row["step"] == 24] == [7.5] * 3


def test_difficulty_is_that_of_the_first_time():
    def asked(step, problem, *solved):
        return [Asked(step, problem, bool(s)) for s in solved]

    rows = asked(1, "never", 0, 0, 0, 0) + asked(1, "half", 1, 1, 0, 0) + asked(2, "always", 1, 1, 1, 1)
    rows += asked(3, "never", 1, 0, 0, 0) + asked(3, "half", 0, 0, 0, 0) + asked(5, "always", 1, 1, 1, 0)
    rows += asked(5, "never", 1, 1, 1, 1) + asked(5, "once", 1, 1)
    found = by_difficulty(rows, 0.3, 0.7)
    assert found == {"hard": [(3, 0.25), (5, 1.0)], "medium": [(3, 0.0)], "easy": [(5, 0.75)]}
    assert by_difficulty(rows, 0.0, 1.0)["medium"] == [(3, 0.125), (5, 0.875)]
    assert by_difficulty([], 0.3, 0.7) == {}


def test_curves_are_made_of_what_was_logged():
    """The policy's weights fade in, samples with a bonus come out of the policy's, counts that grow become shares."""
    curves = {
        "curriculum/routing": [(1, 0.0), (2, 0.5), (3, 1.0)],
        "router/policy_weight": [(1, 0.8), (2, 0.8), (3, 0.6)],
        "router/policy_share": [(1, 0.5), (2, 0.5), (3, 0.75)],
        "router/teacher": [(1, 1.0), (2, 0.75), (3, 0.5)],
        "router/distill_weight": [(1, 0.25), (2, 0.25), (3, 0.25)],
        "router/rebellious_share": [(1, 0.25), (2, 0.0), (3, 0.5)],
        "buffer/problems": [(1, 4.0), (2, 8.0)],
        "buffer/asked": [(1, 4.0), (2, 4.0), (3, 8.0)],
        "buffer/served": [(1, 1.0), (2, 1.0), (3, 4.0)],
    }
    seed = online_files.Seed("seed-0/drift", curves)
    assert online._faded(seed).curves["router/policy_weight"] == [(1, 0.0), (2, 0.4), (3, 0.6)]
    assert online._faded(seed).curves["router/distill_weight"] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert online._without_overlap(seed).curves["router/policy_share"] == [(1, 0.25), (2, 0.5), (3, 0.25)]
    held = online._buffer(seed, 16).curves
    assert held["held"] == [(1, 0.25), (2, 0.5)]
    assert held["served"] == [(1, 0.25), (3, 0.75)]  # of the step's questions; a step without any has no share
