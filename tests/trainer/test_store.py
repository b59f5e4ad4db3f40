"""Rollout files: published and own rows load, bad rows are refused in words, interrupted writes lose nothing else."""

import copy
import errno
import json
import logging
import os

import pytest

from drift.files import LockedError, WriteError
from drift.returns import trajectory_return
from drift.store import StoreError, Writer, check_policy, read, rewind, validate

DROP = object()


def row(**changes):
    """A row with everything in it: "6" then "7" sampled after two prompt tokens each."""
    made = {
        "prompt_id": "p",
        "messages": [
            {"role": "user", "content": "3+4="},
            {"role": "assistant", "content": "<answer>6</answer>"},
            {"role": "user", "content": "Incorrect. Please think again."},
            {"role": "assistant", "content": "<answer>7</answer>"},
        ],
        "verifier": {"t1": 0, "t2": 1},
        "turn_rewards": {"t1": 0.0, "t2": 1.0},
        "answer_norms": ["6", "7"],
        "format_penalty": 0.0,
        "t_star": 2,
        "traj_idx": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "policy_hash": "abc",
        "policy_version": 0,
        "token_ids": [1, 2, 6, 9, 1, 2, 7, 9],
        "loss_mask": [0, 0, 1, 1, 0, 0, 1, 1],
        "logprobs": [0.0, 0.0, -0.5, -0.1, 0.0, 0.0, -0.7, -0.2],
        "turn_starts": [2, 6],
    }
    made.update(changes)
    return {key: value for key, value in made.items() if value is not DROP}


OURS = ("temperature", "top_p", "policy_hash", "policy_version", "token_ids", "loss_mask", "logprobs", "turn_starts")


def published(**changes):
    return row(**dict.fromkeys(OURS, DROP), **changes)


def write_lines(path, *rows, end="\n"):
    path.write_bytes("\n".join(json.dumps(r) if isinstance(r, dict) else r for r in rows).encode() + end.encode())
    return path


# --- one row ---


def test_good_rows_pass_unchanged():
    from_the_start = {
        "token_ids": [6, 9, 7],
        "loss_mask": [1, 0, 1],
        "turn_starts": [0, 2],
        "logprobs": [-1.0, 0.0, -2.0],
    }
    for good in (row(), published(), row(extra={"kept": [1]}), row(**from_the_start)):
        before = copy.deepcopy(good)
        assert validate(good) == before
        assert good == before


def test_older_and_padded_rows_come_out_in_the_current_form():
    old = published(
        format_penalty=DROP,
        trajectory_penalty=-0.1,
        verifier={"t1": False, "t2": True, "t3": None, "t4": 0, "t5": 0},
        turn_rewards={"t1": 0, "t2": 1.0, "t3": None, "t4": 0.0, "t5": 0.0},
        answer_norms=DROP,
    )
    before = copy.deepcopy(old)
    new = validate(old)
    assert old == before
    assert new["format_penalty"] == -0.1
    assert "trajectory_penalty" not in new
    assert new["verifier"] == {"t1": 0, "t2": 1, "t4": 0, "t5": 0}
    assert new["turn_rewards"] == {"t1": 0, "t2": 1.0, "t4": 0.0, "t5": 0.0}
    assert new["answer_norms"] == []


def test_format_penalty_goes_before_its_older_name():
    assert validate(row(format_penalty=-0.2, trajectory_penalty=-0.1))["format_penalty"] == -0.2


@pytest.mark.parametrize("key", ["prompt_id", "messages", "verifier", "turn_rewards", "format_penalty", "t_star"])
def test_missing_key(key):
    with pytest.raises(StoreError, match=f"^{key} is missing$"):
        validate(row(**{key: DROP}))


BAD = [
    ({"prompt_id": 7}, "prompt_id is 7; it should be a non-empty string"),
    ({"prompt_id": ""}, "prompt_id is ''"),
    ({"messages": []}, "messages should be a non-empty list"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] should be an object with the strings role and content"),
    ({"verifier": [1]}, r"verifier is \[1\]; it should be an object with keys"),
    ({"verifier": {"t1": 0, "2": 1}}, "verifier has the key '2'"),
    ({"verifier": {"t0": 0, "t2": 1}}, "verifier has the key 't0'"),
    ({"verifier": {"t1": 0, "t2": 0.5}}, "verifier.t2 is 0.5; it should be 0 or 1"),
    ({"turn_rewards": {"t1": "1"}}, "turn_rewards.t1 is '1'; it should be a number between -1e9 and 1e9"),
    ({"turn_rewards": {"t1": float("nan")}}, "turn_rewards.t1 is nan"),
    ({"turn_rewards": {"t1": True}}, "turn_rewards.t1 is True"),
    ({"answer_norms": [7]}, r"answer_norms is \[7\]; it should be a list of strings"),
    ({"answer_norms": "7"}, "answer_norms is '7'"),
    ({"format_penalty": 0.1}, "format_penalty is 0.1; it should be a number between -1e9 and 0"),
    ({"format_penalty": None}, "format_penalty is None"),
    ({"t_star": None}, "t_star is None; it should be 2, the first turn that is verified"),
    ({"t_star": 1}, "t_star is 1; it should be 2"),
    ({"t_star": "2"}, "t_star is '2'"),
    ({"verifier": {"t1": 0}}, "t_star is 2; it should be null"),
    ({"traj_idx": -1}, "traj_idx is -1; it should be a whole number"),
    ({"traj_idx": True}, "traj_idx is True"),
    ({"policy_version": 0.5}, "policy_version is 0.5"),
    ({"temperature": -1}, "temperature is -1"),
    ({"top_p": 0}, "top_p is 0; it should be a number above 0"),
    ({"policy_hash": 5}, "policy_hash is 5; it should be a string"),
    ({"token_ids": DROP}, "loss_mask, logprobs, turn_starts without token_ids"),
    ({"token_ids": []}, "token_ids is"),
    ({"token_ids": [1, 2, 6, 9, 1, 2, 7, -9]}, "token_ids is"),
    ({"token_ids": [1, 2, 6, 9, 1, 2, 7]}, "loss_mask has 8 entries for 7 tokens"),
    ({"loss_mask": DROP}, "token_ids without loss_mask"),
    ({"loss_mask": [0, 0, 1, 2, 0, 0, 1, 1]}, "loss_mask is .* it should be a list of 0 and 1"),
    ({"logprobs": [0.0, 0.0, -0.5]}, "logprobs has 3 entries for 8 tokens"),
    ({"logprobs": [0.0, 0.0, -0.5, None, 0.0, 0.0, -0.7, -0.2]}, "logprobs is .* finite numbers"),
    ({"logprobs": [0.0, -0.3, -0.5, -0.1, 0.0, 0.0, -0.7, -0.2]}, r"logprobs\[1\] should be 0.0"),
    ({"turn_rewards": {"t1": 10**400}}, "turn_rewards.t1 is 1000"),
    ({"verifier": {"t123456": 1}, "t_star": 123456}, "verifier has the key 't123456'"),
    ({"prompt_id": "\ud800"}, "prompt_id is"),
    ({"messages": [{"role": "user", "content": "half: \ud83d"}]}, r"messages\[0\] should be .* in whole characters"),
    ({"answer_norms": ["\udfff"]}, "answer_norms is"),
    ({"token_ids": [True, 2, 6, 9, 1, 2, 7, 9]}, "token_ids is"),
    ({"earlier_turns": "x"}, "earlier_turns is 'x'; it should be a list of objects"),
    ({"earlier_turns": [{"loss_mask": [1]}]}, r"earlier_turns\[0\]: token_ids is missing"),
    (
        {"earlier_turns": [{"token_ids": [1], "loss_mask": [0, 1]}]},
        r"earlier_turns\[0\]: loss_mask has 2 entries for 1",
    ),
    ({**dict.fromkeys(OURS, DROP), "earlier_turns": []}, "earlier_turns without token_ids"),
    ({"turn_starts": [2]}, r"turn_starts is \[2\]; it should be \[2, 6\]"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_value(changes, reason):
    with pytest.raises(StoreError, match=reason):
        validate(row(**changes))


def test_long_values_are_shortened_in_complaints():
    with pytest.raises(StoreError) as caught:
        validate(row(turn_starts=list(range(5000))))
    assert len(str(caught.value)) < 200


# --- files ---


def test_read_names_file_and_line(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", row(), row(traj_idx=1, t_star=1), row(traj_idx=2))
    with pytest.raises(StoreError) as caught:
        read(path)
    assert str(caught.value) == f"{path}:2: t_star is 1; it should be 2, the first turn that is verified"


def test_read_collects_what_it_rejects(tmp_path, caplog):
    path = write_lines(tmp_path / "r.jsonl", row(), "", "[1]", '{"a": ', row(), row(traj_idx=1), '{"prompt_id": "p')
    path.write_bytes(path.read_bytes().replace(b'{"prompt_id": "p\n', b'{"prompt_id": "p\xc3'))
    rejected = []
    assert read(path, rejected) == [row(), row(traj_idx=1)]
    assert [line for line, _ in rejected] == [3, 4, 5, 7]
    reasons = [reason for _, reason in rejected]
    assert reasons[0] == "a row should be a JSON object, not list"
    assert reasons[1].startswith("not JSON in UTF-8: ")
    assert reasons[2].startswith("prompt_id 'p', traj_idx 0 is on line 1 already; two processes may have written")
    assert reasons[3] == "torn last line, left by an interrupted write"
    assert f"{path}:7: torn last line" in caplog.text


def test_torn_last_line_is_reported_and_skipped(tmp_path, caplog):
    path = write_lines(tmp_path / "r.jsonl", row(), '{"prompt_id": "p", "mess', end="")
    with caplog.at_level(logging.WARNING):
        assert read(path) == [row()]
    assert "torn last line" in caplog.text


def test_broken_json_with_a_line_end_is_not_torn(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", row(), '{"prompt_id": "p", "mess')
    with pytest.raises(StoreError, match=r"r\.jsonl:2: not JSON"):
        read(path)


def test_whole_last_line_without_a_line_end_counts(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", row(), row(traj_idx=1), end="")
    assert len(read(path)) == 2
    with pytest.raises(StoreError, match=r"r\.jsonl:1: t_star"):
        read(write_lines(tmp_path / "r.jsonl", row(t_star=1), end=""))


def test_missing_traj_idx_is_assigned_in_order_within_its_prompt(tmp_path):
    rows = [
        published(prompt_id=p, traj_idx=i) for p, i in (("a", DROP), ("b", DROP), ("a", 0), ("a", DROP), ("b", DROP))
    ]
    read_back = read(write_lines(tmp_path / "r.jsonl", *rows))
    assert [(r["prompt_id"], r["traj_idx"]) for r in read_back] == [("a", 1), ("b", 0), ("a", 0), ("a", 2), ("b", 1)]


def test_empty_file(tmp_path):
    assert read(write_lines(tmp_path / "r.jsonl", end="")) == []


# --- writing ---


def test_writer_appends_flushes_and_resumes(tmp_path):
    path = tmp_path / "new" / "folder" / "r.jsonl"
    text = "a\u2028line “separator”, ünïcode\nand a new line"
    first = row(messages=[{"role": "user", "content": text}])
    with Writer(path) as writer:
        assert writer.done == set()
        assert writer.write(first) == first
        assert read(path) == [first]  # before closing
        assert "ünïcode".encode() in path.read_bytes()  # readable, not \\u00fc
    with Writer(path, fsync=True) as writer:
        assert writer.done == {("p", 0)}
        writer.write(row(traj_idx=3))
        assert writer.done == {("p", 0), ("p", 3)}
        for index in (1, 2, 4):
            assert writer.write(row(traj_idx=DROP))["traj_idx"] == index
    assert [r["traj_idx"] for r in read(path)] == [0, 3, 1, 2, 4]


def test_writer_refuses_bad_rows_and_repeats_without_writing(tmp_path):
    path = tmp_path / "r.jsonl"
    with Writer(path) as writer:
        writer.write(row())
        before = path.read_bytes()
        with pytest.raises(StoreError, match=r"prompt_id 'p', traj_idx 0 is in .* already"):
            writer.write(row())
        with pytest.raises(StoreError, match="t_star is 1"):
            writer.write(row(traj_idx=1, t_star=1))
        assert path.read_bytes() == before
        assert writer.done == {("p", 0)}
    with Writer(path) as writer, pytest.raises(StoreError, match="already"):
        writer.write(row())


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_writer_mends_a_torn_last_line(tmp_path, caplog, kept):
    path = write_lines(tmp_path / "r.jsonl", row(), row(traj_idx=1))
    whole = path.read_bytes()
    line = whole.split(b"\n")[0] + b"\n"
    path.write_bytes(line + whole[len(line) : -1][:kept])
    with Writer(path) as writer:
        assert "torn last line" in caplog.text
        assert path.read_bytes() == line
        assert writer.done == {("p", 0)}
        writer.write(row(traj_idx=1))
    assert path.read_bytes().count(b"\n") == 2
    assert read(path) == [row(), row(traj_idx=1)]


def test_writer_ends_a_whole_last_line(tmp_path, caplog):
    path = write_lines(tmp_path / "r.jsonl", row(), end="")
    with Writer(path) as writer:
        writer.write(row(traj_idx=1))
    assert read(path) == [row(), row(traj_idx=1)]
    assert caplog.text == ""


def test_writer_does_not_go_on_from_a_bad_file(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", row(), "{}", row(traj_idx=1))
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"r\.jsonl:2: prompt_id is missing"):
        Writer(path)
    assert path.read_bytes() == before


def test_check_policy():
    assert check_policy([row(), published(), row()], "abc") == 1
    with pytest.raises(
        StoreError, match="traj_idx 4 was sampled by policy 'abc', not by the reference 'xyz'; sample again"
    ):
        check_policy([published(), row(traj_idx=4)], "xyz")


def test_windows_line_ends_and_a_byte_order_mark_are_no_matter(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(json.dumps(row(traj_idx=i)).encode() + b"\r\n" for i in (0, 1)))
    assert read(path) == [row(), row(traj_idx=1)]


def test_rows_on_one_line_are_not_torn(tmp_path):
    """Of old line ends, say: all of the file would go as its torn last line."""
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\r".join(json.dumps(row(traj_idx=i)).encode() for i in (0, 1)))
    before = path.read_bytes()
    for refuses in (read, Writer):
        with pytest.raises(StoreError, match=r"r\.jsonl:1: not JSON in UTF-8: Extra data"):
            refuses(path)
    assert path.read_bytes() == before


def test_too_many_brackets_are_a_bad_row(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", "[" * 100_000)
    with pytest.raises(StoreError, match=r"r\.jsonl:1: not JSON"):
        read(path)


@pytest.mark.parametrize("content", ["precious notes, not json", '[\n {"a": 1}\n]', "\ufeff{}"])
def test_another_programs_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StoreError):
        Writer(path)
    assert path.read_text(encoding="utf-8") == content
    with pytest.raises(StoreError):
        read(path)


def test_rewind_keeps_the_steps_that_count(tmp_path):
    """Rows of an online training past a step go, a torn line with them; another program's file is left alone."""
    path = write_lines(tmp_path / "r.jsonl", *(row(traj_idx=i, step=1 + i // 2) for i in range(6)))
    whole = path.read_bytes()
    assert rewind(path, 3) == 0
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-30])
    assert rewind(path, 2) == 1  # and the torn one
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    assert rewind(path, 0) == 4
    assert path.read_bytes() == b""
    assert rewind(tmp_path / "none.jsonl", 0) == 0
    write_lines(path, row())
    with pytest.raises(StoreError, match=r"r.jsonl:1: the row has no step"):
        rewind(path, 0)
    assert path.read_bytes().count(b"\n") == 1
    path.write_bytes(whole + b"\0" * 9)  # after a power loss
    assert rewind(path, 3) == 0
    assert path.read_bytes() == whole
    for broken in (b'{"step": 1, "pro\n', b"\x00\n"):  # amid the file
        path.write_bytes(whole + broken)
        with pytest.raises(StoreError, match=r"r.jsonl:7: not JSON in UTF-8"):
            rewind(path, 9)
        assert path.read_bytes() == whole + broken


def test_rows_of_two_processes_in_one_file_are_refused_with_the_remedy(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", *(row(traj_idx=i, step=step) for i, step in enumerate((1, 2, 1, 2))))
    with pytest.raises(StoreError, match=r"r\.jsonl:3: step 1 after step 2; two processes .* remove the folder"):
        rewind(path, 2)


def test_a_second_process_gets_no_writer(tmp_path):
    with Writer(tmp_path / "r.jsonl") as writer:
        with pytest.raises(LockedError, match="another process is writing to"):
            Writer(tmp_path / "r.jsonl")
        writer.write(row())
    with Writer(tmp_path / "r.jsonl") as writer:
        assert writer.done == {("p", 0)}


@pytest.mark.parametrize("tail", [b"\0" * 9, b'{"prompt_id": "x\0\0\0'], ids=["NUL bytes", "torn, then NUL bytes"])
def test_nul_bytes_at_the_end_are_cut_off(tmp_path, tail):
    path = write_lines(tmp_path / "r.jsonl", row())
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert read(path) == [row()]
    with Writer(path):
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1] + b"\0" * 7)  # a whole row without its line end
    with Writer(path):
        assert path.read_bytes() == whole


def test_a_row_that_the_disk_refuses_leaves_no_half_line(tmp_path, monkeypatch):
    path, write, room = tmp_path / "r.jsonl", os.write, 30

    def full(descriptor, data):
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(descriptor, bytes(data)[:room])
        room -= done
        return done

    with Writer(path) as writer:
        writer.write(row())
        whole = path.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(WriteError, match=r"r\.jsonl cannot be written: No space left on device; make room"):
            writer.write(row(traj_idx=1))
        assert path.read_bytes() == whole
        assert writer.done == {("p", 0)}
        monkeypatch.setattr(os, "write", write)
        writer.write(row(traj_idx=1))
    assert read(path) == [row(), row(traj_idx=1)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logprobs": [0.0, 0.0, 0.5]}, r"logprobs\[2\] is 0.5; it should be at most 0"),
        ({"turn_rewards": {"t1": 1e308}}, r"turn_rewards.t1 is 1e\+308; it should be a number between -1e9"),
        ({"format_penalty": -1e300}, "format_penalty is -1e\\+300"),
    ],
)
def test_values_that_no_sampler_or_verifier_gives_are_refused(changes, reason):
    good = row(token_ids=[5, 6, 7], loss_mask=[0, 1, 1], logprobs=[0.0, -1.0, -0.5], turn_starts=DROP)
    assert validate(good)
    with pytest.raises(StoreError, match=reason):
        validate({**good, **changes})


def test_a_minimal_row_of_messages_and_reward_is_completed(tmp_path):
    def row(question, answer, reward, **more):
        said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": said, "reward": reward, **more}

    path = tmp_path / "min.jsonl"
    rows = [
        row("a", "1", 0.25),
        row("a", "2", 1),
        row("b", "1", -2.0),
        row("c", "1", 1.5, group="g"),
        row("d", "1", 0, group="g"),
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    rows = read(path)
    names = [one["prompt_id"] for one in rows]
    assert names[0] == names[1] != names[2]
    assert names[3:] == ["g", "g"]
    assert [one["traj_idx"] for one in rows] == [0, 1, 0, 0, 1]
    assert [one["t_star"] for one in rows] == [None, 1, None, 1, None]
    assert [trajectory_return(one) for one in rows] == [0.25, 1.0, -2.0, 1.5, 0.0]
    assert validate(rows[0]) == rows[0]


def test_a_reward_is_the_return_however_many_turns_the_row_has():
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    row = validate({"messages": turns, "reward": 1.0})
    assert trajectory_return(row, gamma=0.5) == 1.0


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": "user", "content": "x"}], "reward": 1}, "a prompt and then an answer"),
        (
            {"messages": [{"role": "user", "content": "x"}] * 2, "reward": "1"},
            "reward is '1'; it should be a finite number",
        ),
        ({"reward": 1}, "messages should be a non-empty list"),
    ],
)
def test_a_minimal_row_that_cannot_be_completed_says_why(row, words):
    with pytest.raises(StoreError, match=words):
        validate(row)
