"""10,000 bad rows among good ones: none is read as a trajectory, none ends the reading, all are counted and located."""

from __future__ import annotations

import copy
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift.store import read

FILES, ROWS = 100, 100
GOOD = {
    "prompt_id": "p",
    "messages": [{"role": "user", "content": "3+4="}, {"role": "assistant", "content": "<answer>7</answer>"}],
    "verifier": {"t1": 1},
    "turn_rewards": {"t1": 1.0},
    "answer_norms": ["7"],
    "format_penalty": 0.0,
    "t_star": 1,
    "token_ids": [1, 2, 7, 9],
    "loss_mask": [0, 0, 1, 1],
    "logprobs": [0.0, 0.0, -0.7, -0.2],
    "turn_starts": [2],
}
NEEDED = ("prompt_id", "messages", "verifier", "turn_rewards", "format_penalty", "t_star")
above, text = st.floats(1e-3, 1e300), st.text(max_size=5)
big = st.floats(1e10, 1e308) | st.floats(-1e308, -1e10)
ids = st.lists(st.integers(0, 9), min_size=4, max_size=4)


def changed(*path):
    """A strategy of values for the entry at `path` → of rows with it."""

    def change(value):
        row = copy.deepcopy(GOOD)
        place = row
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return json.dumps(row).encode()

    return lambda values: values.map(change)


BAD_LINES = st.one_of(
    st.sampled_from(NEEDED).map(lambda key: json.dumps({k: v for k, v in GOOD.items() if k != key}).encode()),
    changed("prompt_id")(st.integers() | st.just("") | st.none()),
    changed("messages")(st.just([]) | text | st.lists(st.integers(), min_size=1, max_size=2)),
    changed("messages", 1, "content")(st.integers() | st.none() | st.just("\ud800")),
    changed("verifier", "t1")(st.integers(2) | text),
    changed("turn_rewards", "t1")(big | text | st.just(float("nan")) | st.just(float("inf")) | st.booleans()),
    changed("turn_rewards")(st.dictionaries(st.sampled_from(["1", "t0", "turn"]), st.just(1.0), min_size=1)),
    changed("format_penalty")(above | st.floats(-1e308, -1e10) | text),
    changed("t_star")(st.integers(2) | st.none() | st.just(True)),
    changed("token_ids")(
        st.lists(st.integers(0, 9), max_size=3) | st.lists(st.integers(-9, -1), min_size=4, max_size=4)
    ),
    changed("loss_mask")(st.lists(st.integers(2, 9), min_size=4, max_size=4)),
    changed("logprobs")(ids.filter(any) | st.lists(above, min_size=4, max_size=4) | st.just([0.0, 0.0, -0.7])),
    changed("logprobs", 3)(above | st.just(float("nan")) | text),
    changed("turn_starts")(st.just([3]) | st.just([]) | text),
    st.binary(min_size=1, max_size=30)
    .map(lambda b: b"#" + b.replace(b"\n", b" "))
    .filter(lambda line: bool(line.strip(b"\0").strip())),
    st.integers(1, 60).map(lambda cut: json.dumps(GOOD).encode()[:-cut]),
    st.just(b"[" * 5000),
)


@settings(max_examples=FILES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(BAD_LINES, min_size=ROWS, max_size=ROWS))
def test_bad_rows_are_refused_by_line_and_the_good_ones_are_read(tmp_path_factory, bad):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines, expected = [], []
    for place, line in enumerate(bad):
        lines.append(line)
        expected.append(len(lines))
        if place % 10 == 0:
            lines.append(json.dumps(GOOD).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    rejected: list[tuple[int, str]] = []
    places: list[int] = []
    rows = read(path, rejected, places)
    assert [number for number, _ in rejected] == expected
    assert all(reason for _, reason in rejected)
    assert len(rows) == len(places) == len(lines) - len(bad)
    assert {json.dumps({k: v for k, v in row.items() if k != "traj_idx"}) for row in rows} == {json.dumps(GOOD)}
