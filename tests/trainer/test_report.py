import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_run import make_run, write_lines

from drift import report
from drift.config import dump, parse
from drift.report.plots import thin
from drift.report.records import RecordsError, read

ATTACK = '</pre></script><script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def page(finished):
    return page_of(finished)


def page_of(folder):
    path = report.write(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Parsed(HTMLParser):
    """Every tag with its attributes, checked to be closed in order, and the text outside style."""

    EMPTY = ("meta", "img", "br", "link", "input")

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(page)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def text_of(page):
    return re.sub(r"\s+", " ", " ".join(Parsed(page).text))


def test_the_page_needs_nothing_from_elsewhere(page):
    tags = Parsed(page).tags
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            if name.endswith(("href", "src")):
                assert value.startswith("#"), f"{tag} {name}={value}"
    assert not re.search(r"@import|url\((?!#)", page)
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {
        "http://127.0.0.1:8000",  # a setting, as text: engine.url
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }


def test_ids_are_unique_and_every_reference_is_met(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {a or b for a, b in used} <= set(ids)


def test_the_headline_has_means_and_paired_differences(finished, page):
    results = json.loads((finished / "summary.json").read_text())["results"]
    ours, uniform = (np.array(results[arm]["multi_at_5"]) for arm in ("drift", "uniform"))
    gain = ours - uniform
    text = text_of(page)
    narrow = "\N{NARROW NO-BREAK SPACE}"
    assert f"{100 * ours.mean():.1f}{narrow}%".replace(narrow, " ") in text
    stderr = gain.std(ddof=1) / np.sqrt(len(gain))
    assert f"+{100 * gain.mean():.1f} ± {100 * stderr:.1f}" in text
    assert "beyond 2 s.e." in text
    for words in ("7 min 11 s", "in 24 groups", "effective sample size", "unsolved groups", "embedded tiny model"):
        assert words in text
    assert page.count("<svg") == 10


def test_the_effective_sample_size_is_that_of_the_weights(finished, page):
    part = read(finished).sampled[0]
    weights = np.array(part.weights)
    expected = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    assert part.ess == pytest.approx(expected)
    assert f"{100 * expected:.1f} %" in text_of(page)
    assert part.unsolved == np.mean([all(part.rows[i]["t_star"] is None for i in group) for group in part.groups])
    assert [weights[group].mean() for group in part.groups] == pytest.approx([1.0] * len(part.groups))


def test_pass_at_k_and_repeats_of_what_was_sampled(finished, page):
    part = read(finished).sampled[0]
    right = [[part.rows[i]["t_star"] is not None for i in group] for group in part.groups]
    for k in (2, 4):
        subsets = [[any(s) for s in itertools.combinations(group, k)] for group in right]
        expected = np.mean([np.mean(found) for found in subsets])
        assert f"pass@{k} {100 * expected:.1f} %" in text_of(page)
    again = sum(a in row["answer_norms"][:i] for row in part.rows for i, a in enumerate(row["answer_norms"]))
    share = again / sum(len(row["answer_norms"]) for row in part.rows)
    assert f"repeat rate {100 * share:.1f} %" in text_of(page)


def test_how_far_training_went_is_the_mean_over_seeds(tmp_path):
    folder = make_run(tmp_path / "run", seeds=2, prompts=1)
    assert "How far training went" not in text_of(page_of(folder))
    with (folder / "metrics.jsonl").open("a") as file:
        for seed in (0, 1):
            values = {"base_entropy": 1.0, "entropy": 0.5 + seed, "base_kl": 0.25}
            named = {f"seed-{seed}/drift/watch/{name}": value for name, value in values.items()}
            file.write(json.dumps({"step": 1} | named) + "\n")
    assert "How far training went" in text_of(page_of(folder))
    assert "drift 1.000 1.000 0.250" in text_of(page_of(folder))


def test_trajectories_show_weight_return_and_the_trained_turn(page):
    articles = re.findall(r'<article class="trajectory">.*?</article>', page, flags=re.DOTALL)
    assert len(articles) >= 4
    for article in articles:
        assert re.search(r"<b>w = [\d.e+-]+</b><b>R = -?[\d.]+</b>", article)
        assert article.count('class="turn assistant trained"') == 1
        last = article.rindex('class="turn assistant')
        assert article[last:].startswith('class="turn assistant trained"')


def test_every_assistant_turn_is_marked_where_all_are_trained(tmp_path):
    folder = make_run(tmp_path / "run", seeds=1, prompts=4)
    (folder / "config.yaml").write_text(dump(parse({"name": "x", "train": {"turns": "assistant"}})))
    page = page_of(folder)
    assert 'class="turn assistant"' not in page
    assert 'class="turn assistant trained"' in page


def test_markup_from_models_data_and_settings_is_escaped(tmp_path):
    folder = make_run(tmp_path / "run", seeds=1, prompts=3)
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt_id"] += ATTACK
        row["answer_norms"] = [answer + ATTACK for answer in row["answer_norms"]]
        for message in row["messages"]:
            message["content"] = ATTACK + message["content"]
    write_lines(folder / "rollouts.jsonl", rows)
    (folder / "config.yaml").write_text(
        dump(parse({"name": "x", "model": {"path": ATTACK}, "task": {"name": ATTACK, "options": {"k": ATTACK}}}))
    )
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"name": ATTACK, "seconds": {ATTACK: 1.0, "total": 1.0}, "seeds": [ATTACK]}
    summary["results"][ATTACK] = summary["results"]["drift"]
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (1, 2):
            name = ATTACK.replace("/", "∕")
            file.write(json.dumps({"step": step, "cost in $ and $": 1.0, f"seed-0/drift/{name}": 2.0}) + "\n")
    page = page_of(folder)
    tags = {tag for tag, _ in Parsed(page).tags}
    assert not {"script", "img"} & tags
    assert "onerror" not in {name for _, attributes in Parsed(page).tags for name in attributes}
    text = text_of(page)
    assert text.count('<script>alert("x")</script>') > 10
    assert "cost in $ and $" in text


def test_odd_characters_reach_the_page(tmp_path):
    folder = make_run(tmp_path / "run", seeds=1, prompts=1)
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"][0]["content"] = "a \x00 and a \x1b[31m, שלום, " + "long " * 2000
    write_lines(folder / "rollouts.jsonl", rows)
    page = page_of(folder)
    assert "a ␀ and a ␛[31m, שלום" in page
    assert "characters more" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page)
    rows[0]["messages"][0]["content"] = "half \ud83d of a pair"
    write_lines(folder / "rollouts.jsonl", rows)
    assert "line 1: messages[0] should be an object" in text_of(page_of(folder))


def test_an_empty_folder_says_what_is_missing(tmp_path):
    text = text_of(page_of(tmp_path))
    for words in ("config.yaml", "summary.json", "metrics.jsonl", "rollouts.jsonl", "no seed has been evaluated"):
        assert words in text


def test_an_unfinished_run_is_read_from_its_evaluations(tmp_path):
    folder = make_run(tmp_path / "run", summary=False)
    (folder / "seed-2" / "eval-drift.json").unlink()
    records = read(folder)
    assert records.seeds == [0, 1]
    solved = json.loads((folder / "seed-1" / "eval-drift.json").read_text())["solved_at"]
    assert records.results["drift"].multi[1] == sum(0 < t <= 5 for t in solved) / len(solved)
    assert records.results["drift"].single[1] == sum(t == 1 for t in solved) / len(solved)
    text = text_of(page_of(folder))
    assert "summary.json: the run is not finished" in text
    assert "2 seeds" in text


def test_a_run_that_has_just_begun_shows_its_base_and_its_time(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "eval.json").write_text(json.dumps({"solved_at": [1, 0, 2, 0, 0]}))
    (tmp_path / "seconds.json").write_text(json.dumps({"warm_start": 75.2}))
    text = text_of(page_of(tmp_path))
    assert "40.0 %" in text
    assert "20.0 %" in text
    assert "warm_start 1 min 15 s" in text


def test_only_seeds_and_arms_of_the_config_are_read(tmp_path):
    folder = make_run(tmp_path / "run", seeds=3, prompts=2, summary=False)
    (folder / "config.yaml").write_text(dump(parse({"name": "x", "seeds": [2, 0], "arms": ["drift"]})))
    base = json.loads((folder / "seed-0" / "eval-base.json").read_text())
    (folder / "base").mkdir()
    (folder / "base" / "eval.json").write_text(json.dumps(base))
    (folder / "seed-2" / "eval-base.json").unlink()
    records = read(folder)
    assert records.seeds == [2, 0]
    assert list(records.results) == ["base", "drift"]
    assert records.solved_at["base"] == [base["solved_at"]] * 2


def test_rollouts_of_every_seed_are_weighed_apart(tmp_path):
    folder = make_run(tmp_path / "run", seeds=2, prompts=3)
    (folder / "seed-1" / "rollouts.jsonl").write_text((folder / "rollouts.jsonl").read_text())
    first, second = read(folder).sampled
    assert (first.source, second.source) == ("rollouts.jsonl", "seed-1/rollouts.jsonl")
    assert first.weights == second.weights
    assert "2 rollout files" in text_of(page_of(folder))


def test_broken_files_are_reported_not_fatal(tmp_path):
    folder = make_run(tmp_path / "run", seeds=1, prompts=2)
    (folder / "summary.json").write_text('{"name": "x", "resu')
    (folder / "config.yaml").write_text("name: x\nnonsense: 3\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"no_step": 1}\n{"step": 4, "lo')
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write('{"prompt_id": "a"}\n')
    text = text_of(page_of(folder))
    for words in ("summary.json cannot be read", "nonsense", "metrics.jsonl: 2 lines", "1 rows are left out"):
        assert words in text


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("results",), [1], "results should be an object"),
        (("results", "drift"), {}, r"results\.drift should be an object with one list multi_at_K"),
        (("results", "drift", "multi_at_x"), [0.5], r"results\.drift should be .* multi_at_K"),
        (("results", "drift", "multi_at_5"), [0.5, "high"], r"results\.drift\.multi_at_5 should be a list of shares"),
        (("results", "drift", "single"), [0.5, 50.0], r"results\.drift\.single should be a list of shares"),
        (("results", "drift", "single"), [0.5], r"results\.drift\.single should have 2 entries"),
        (("results", "drift", "by_turn"), [[0.5], None], r"results\.drift\.by_turn should be 2 lists"),
        (("results", "base"), {"multi_at_5": [0.5], "single": [0.5]}, "as many seeds and turns as the other arms"),
        (("seeds",), [0], "seeds should list 2"),
        (("seconds",), {"train": "long"}, "seconds should be an object of numbers"),
    ],
)
def test_a_summary_that_no_run_wrote_is_refused_in_words(place, value, said, tmp_path):
    folder = make_run(tmp_path / "run", seeds=2, prompts=1)
    part = content = json.loads((folder / "summary.json").read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (folder / "summary.json").write_text(json.dumps(content))
    with pytest.raises(
        RecordsError, match=rf"^{re.escape(str(folder / 'summary.json'))}: [^\n]*{said}[^\n]*mend the file"
    ):
        read(folder)


def test_an_evaluation_that_no_run_wrote_is_refused_in_words(tmp_path):
    folder = make_run(tmp_path / "run", seeds=1, prompts=1, summary=False)
    for bad in ("3", '["a"]', "[1.5]", "[-1]"):
        (folder / "seed-0" / "eval-drift.json").write_text(f'{{"solved_at": {bad}}}')
        with pytest.raises(RecordsError, match=r"eval-drift\.json: solved_at should be a list of turns"):
            read(folder)


def test_lines_of_metrics_that_no_run_wrote_are_counted(tmp_path):
    bad = ["3", "[]", '{"step": 1e400}', '{"step": null}', f'{{"step": 1, "loss": 1{"0" * 400}}}', "[" * 100_000]
    (tmp_path / "metrics.jsonl").write_text("\n".join(['{"step": 1, "loss": 2.0}', *bad]) + "\n")
    records = read(tmp_path)
    assert records.curves == {"loss": {"": [(1, 2.0)]}}
    assert f"metrics.jsonl: {len(bad)} lines cannot be read" in records.missing


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(NotADirectoryError, match="nowhere"):
        report.write(tmp_path / "nowhere")


def test_a_step_logged_twice_keeps_its_last_value(tmp_path):
    lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": None}, {"step": 1, "loss": 3.0}, {"step": 3, "loss": 1.0}]
    write_lines(tmp_path / "metrics.jsonl", lines)
    assert read(tmp_path).curves == {"loss": {"": [(1, 3.0), (3, 1.0)]}}


def test_a_long_run_draws_a_small_page(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": i, "loss": (i % 7) / 7} for i in range(20_000)])
    assert len(page_of(tmp_path)) < 60_000
    points = np.stack([np.arange(1001.0), np.arange(1001.0) ** 2], 1)
    few = thin(points, 10)
    assert few.shape == (10, 2)
    np.testing.assert_allclose(few[0], points[:100].mean(0))
    np.testing.assert_allclose(few[9], points[900:].mean(0))
    assert thin(points, 1001) is points


def test_one_seed_has_no_standard_error(tmp_path):
    text = text_of(page_of(make_run(tmp_path / "run", seeds=1, prompts=2)))
    assert "With one seed there is no standard error" in text
    assert "±" not in text
    assert "nan" not in text
