"""Stored responses: which, in what pieces, and that every value stands at its token."""

import itertools
import json

import pytest
import torch

from drift.config.online import OnlineConfig
from drift.model import tiny
from drift.online import examples
from drift.packing import pack
from drift.types import Trajectory, Turn

TOKENIZER = tiny.build_tokenizer()


def choose(step, kinds, **settings):
    steps = settings.pop("steps", 20)
    return examples.choose(step, OnlineConfig(steps=steps, watch=settings), kinds)


def test_steps_are_evenly_spread_and_end_with_the_last():
    kept = [step for step in range(60) if choose(step, ["x"], steps=60, examples=8)]
    assert len(kept) == 8
    assert kept[-1] == 59
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert set(gaps) <= {7, 8}
    assert [step for step in range(3) if choose(step, ["x"], steps=3, examples=8)] == [0, 1, 2]
    assert not any(choose(step, ["x"], steps=9, examples=0) for step in range(9))


def test_kinds_take_turns():
    kinds = ["a", "a", "a", "b", "a", "c", "c"]
    assert choose(19, kinds, responses=3) == {0, 3, 5}
    assert choose(19, kinds, responses=5) == {0, 1, 3, 5, 6}
    assert choose(19, kinds, responses=99) == set(range(7))
    assert choose(19, [], responses=3) == set()


@pytest.mark.parametrize("text", ["a b  c\n<answer>12</answer><|im_end|>\n", "naïve 日本語 🙂🙂 end", ""])
def test_pieces_are_the_text(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found = examples.pieces(TOKENIZER, ids)
    assert len(found) == len(ids)
    assert "".join(found) == TOKENIZER.decode(ids)


class Spaced:
    """Like a sentence-piece tokenizer: decoding drops a leading space, bytes of a character come one a token."""

    WORDS = (" one", " two", b"\xe2", b"\x82", b"\xac")

    def decode(self, ids, skip_special_tokens=False):
        raw = b"".join(w if isinstance(w, bytes) else w.encode() for w in (self.WORDS[i] for i in ids))
        return raw.decode(errors="replace").removeprefix(" ")


def test_pieces_keep_their_spaces_and_characters_that_span_tokens():
    assert examples.pieces(Spaced(), [0, 1, 2, 3, 4, 1]) == ["one", " two", "", "", "€", " two"]
    assert examples.pieces(Spaced(), [1] * 30) == ["two"] + [" two"] * 29
    assert examples.pieces(Spaced(), [0, 2])[1].endswith("\ufffd")


def test_values_stand_at_their_tokens():
    """A value made of the token itself is found at that token, in any segment of a pack, cut or not."""
    trajectories = [
        Trajectory("p0", [30, 31, 32, 33, 34, 35, 36], [Turn(2, 4), Turn(5, 7)], index=0),
        Trajectory("p1", [40, 41, 42], [Turn(1, 3)], index=1),
    ]
    [batch] = pack(trajectories, 64, max_length=6, turns="assistant")
    doubled = torch.where(batch.targets >= 0, 2.0 * batch.targets, 7.0)
    for segment, index in enumerate(batch.indices):
        kept = trajectories[index].token_ids[-6:]
        row = examples.tokens_of(batch, segment, {"logprobs": doubled}, TOKENIZER)
        assert "".join(row["tokens"]) == TOKENIZER.decode(kept)
        expected = {0: [0, 1, 1, 0, 1, 1], 1: [0, 1, 1]}[index]
        assert row["trained"] == expected
        assert row["logprobs"] == [2.0 * token if on else 0.0 for token, on in zip(kept, expected)]


def test_rows_are_appended_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "deep" / "examples.jsonl"
    examples.append(path, [{"step": 1, "gate": [0.5, float("nan")]}])
    examples.append(path, [{"step": 2}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "gate": [0.5, None]},
        {"step": 2},
    ]


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    path = tmp_path / "examples.jsonl"
    examples.append(path, [{"step": 1}, {"step": 2}])
    path.write_bytes(path.read_bytes()[:-5])
    examples.append(path, [{"step": 2}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]
