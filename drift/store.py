"""Rollout files: one JSON object a line, every row checked, appended to and resumed without loss.

The names are those of the public release of arXiv 2605.31455 (A1), so that its files load here and ours load there:
prompt_id, messages, verifier, turn_rewards, answer_norms, format_penalty, t_star, traj_idx. Ours on top, all optional:
temperature, top_p, policy_hash, policy_version, and per token token_ids, loss_mask, logprobs, turn_starts, which hold
what was sampled; text is never tokenised again. Online trainings add what became of a trajectory: step, staleness,
advantage, pass_rate, had_teacher, distill_weight, policy_weight, rebellious_weight (`drift.online`), and episodes with
tools tool_calls and tool_errors. failed_checks counts turns whose check has no verdict. A minimal row, {"messages",
"reward"} and if wanted "group", is completed. Keys that this file does not know pass through untouched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Container, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

from drift import files
from drift.types import is_whole

logger = logging.getLogger(__name__)
Row = dict[str, Any]
MOST = 1e9  # size of a reward or penalty: sums and squares of a group's stay far from overflow
LOGPROB = 1e-6  # that a log-prob may be above 0, by rounding
_TURN = re.compile(r"t[1-9][0-9]{0,4}")


class StoreError(ValueError):
    """A row that cannot be used, or may not be written; the message says which, and why."""


# --- one row ---


def validate(row: Any) -> Row:
    """A checked copy of a row in the current names and types: `trajectory_penalty` renamed, null padding dropped.

    Raises StoreError naming the key, its value and what it should be.
    """
    _expect(isinstance(row, dict), f"a row should be a JSON object, not {type(row).__name__}")
    row = dict(row)
    if "trajectory_penalty" in row:
        old = row.pop("trajectory_penalty")
        row.setdefault("format_penalty", old)
    if "reward" in row and not row.keys() & {"verifier", "turn_rewards"}:
        row = _from_reward(row)
    for key in ("prompt_id", "messages", "verifier", "turn_rewards", "format_penalty", "t_star"):
        _expect(key in row, f"{key} is missing")
    prompt_id, penalty = row["prompt_id"], row["format_penalty"]
    _require(row, "prompt_id", _is_text(prompt_id) and prompt_id != "", "a non-empty string")
    _check_messages(row["messages"])
    verifier = _turns(row, "verifier", lambda value: value in (0, 1), "0 or 1")
    row["verifier"] = {key: int(value) for key, value in verifier.items()}
    row["turn_rewards"] = _turns(row, "turn_rewards", _is_reward, "a number between -1e9 and 1e9")
    _require(row, "format_penalty", _is_reward(penalty) and penalty <= 0, "a number between -1e9 and 0")
    _check_t_star(row)
    row.setdefault("answer_norms", [])
    norms = row["answer_norms"]
    _require(
        row, "answer_norms", isinstance(norms, list) and all(map(_is_text, norms)), "a list of strings, one an answer"
    )
    _check_optional(row)
    _check_tokens(row)
    _check_earlier_turns(row)
    return row


def _from_reward(row: Row) -> Row:
    """The full form of a minimal row, {"messages", "reward"}: its return is the reward, whatever turns it has.

    "prompt_id" or "group" says which rows are of one prompt; without it, the messages before the first of the assistant do.
    """
    reward, group = row["reward"], row.get("prompt_id", row.get("group"))
    _require(row, "reward", _is_real(reward), "a finite number, the return of the whole trajectory")
    _check_messages(row.get("messages"))
    if group is None:
        opening = list(takewhile(lambda message: message["role"] != "assistant", row["messages"]))
        _expect(
            0 < len(opening) < len(row["messages"]), "messages should be a prompt and then an answer by the assistant"
        )
        group = hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in opening]).encode()).hexdigest()[:16]
    right = reward >= 1
    made = {"prompt_id": str(group), "verifier": {"t1": int(right)}, "turn_rewards": {"t1": reward}}
    return {"format_penalty": 0.0, "t_star": 1 if right else None, **row, **made}


def _expect(holds: bool, complaint: str) -> None:
    if not holds:
        raise StoreError(complaint)


def _require(row: Row, key: str, holds: bool, should_be: str) -> None:
    if not holds:
        shown = repr(row[key])
        raise StoreError(f"{key} is {shown if len(shown) <= 80 else shown[:77] + '…'}; it should be {should_be}")


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_reward(value: Any) -> bool:
    return _is_real(value) and abs(value) <= MOST


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_whole(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _check_messages(messages: Any) -> None:
    _expect(isinstance(messages, list) and len(messages) > 0, "messages should be a non-empty list")
    for index, message in enumerate(messages):
        fits = isinstance(message, dict) and all(_is_text(message.get(key)) for key in ("role", "content"))
        _expect(fits, f"messages[{index}] should be an object with the strings role and content, in whole characters")


def _turns(row: Row, key: str, fits: Callable[[Any], bool], should_be: str) -> Row:
    values = row[key]
    _require(row, key, isinstance(values, dict), 'an object with keys "t1", "t2", …')
    for turn, value in values.items():
        _expect(_TURN.fullmatch(turn) is not None, f'{key} has the key {turn!r}; keys should be "t1", "t2", …')
        _expect(value is None or fits(value), f"{key}.{turn} is {value!r}; it should be {should_be}")
    return {turn: value for turn, value in values.items() if value is not None}


def _check_t_star(row: Row) -> None:
    right = min((int(key[1:]) for key, value in row["verifier"].items() if value), default=None)
    expected = "null, since no turn is verified" if right is None else f"{right}, the first turn that is verified"
    t_star = row["t_star"]
    _require(row, "t_star", (t_star is None or _is_count(t_star)) and t_star == right, expected)


def _check_optional(row: Row) -> None:
    for key, fits, should_be in (
        ("traj_idx", _is_count, "a whole number, at least 0"),
        ("policy_version", _is_count, "a whole number, at least 0"),
        ("temperature", lambda value: _is_real(value) and value >= 0, "a number, at least 0"),
        ("top_p", lambda value: _is_real(value) and 0 < value <= 1, "a number above 0, at most 1"),
        ("policy_hash", lambda value: isinstance(value, str), "a string"),
        ("step", lambda value: _is_count(value) and value > 0, "a whole number, at least 1"),
        ("staleness", _is_count, "a whole number, at least 0"),
        ("tool_calls", _is_count, "a whole number, at least 0"),
        ("tool_errors", _is_count, "a whole number, at least 0"),
    ):
        if key in row:
            _require(row, key, fits(row[key]), should_be)


def _check_tokens(row: Row) -> None:
    present = [key for key in ("loss_mask", "logprobs", "turn_starts") if key in row]
    if "token_ids" not in row:
        _expect(not present, f"{', '.join(present)} without token_ids; per-token keys should come with it")
        return
    _expect("loss_mask" in row, "token_ids without loss_mask; it should say which tokens were sampled")
    ids, mask = row["token_ids"], row["loss_mask"]
    _require(row, "token_ids", _is_list_of(int, ids) and ids != [] and min(ids) >= 0, "a non-empty list of token ids")
    _require(row, "loss_mask", _is_list_of(int, mask) and {*mask} <= {0, 1}, "a list of 0 and 1")
    _expect(len(mask) == len(ids), f"loss_mask has {len(mask)} entries for {len(ids)} tokens; it should have one each")
    if "logprobs" in row:
        logprobs = row["logprobs"]
        _require(
            row, "logprobs", isinstance(logprobs, list) and all(map(_is_real, logprobs)), "a list of finite numbers"
        )
        _expect(
            len(logprobs) == len(ids),
            f"logprobs has {len(logprobs)} entries for {len(ids)} tokens; it should have one each",
        )
        above = next((i for i, value in enumerate(logprobs) if value > LOGPROB), None)
        _expect(
            above is None, f"logprobs[{above}] is {logprobs[above or 0]}; it should be at most 0, since it is log p"
        )
        outside = next((i for i, value in enumerate(logprobs) if value and not mask[i]), None)
        _expect(outside is None, f"logprobs[{outside}] should be 0.0, since loss_mask is 0 there")
    if "turn_starts" in row:
        rises = [i for i, value in enumerate(mask) if value and (i == 0 or not mask[i - 1])]
        _require(row, "turn_starts", row["turn_starts"] == rises, f"{rises}, where loss_mask turns to 1")


def _check_earlier_turns(row: Row) -> None:
    """Samples of turns before the last, with history: template."""
    if "earlier_turns" not in row:
        return
    _expect("token_ids" in row, "earlier_turns without token_ids; the last turn's should come with them")
    earlier = row["earlier_turns"]
    _require(row, "earlier_turns", _is_list_of(dict, earlier), "a list of objects, one a turn")
    for number, sample in enumerate(earlier):
        try:
            _expect("token_ids" in sample, "token_ids is missing")
            _check_tokens(sample)
        except StoreError as error:
            raise StoreError(f"earlier_turns[{number}]: {error}") from None


# --- reading ---


def read(path: str | Path, rejected: list[tuple[int, str]] | None = None, places: list[int] | None = None) -> list[Row]:
    """The rows of a rollout file, each checked; a missing `traj_idx` is assigned in order within its prompt.

    A bad row, or one whose (prompt_id, traj_idx) came before, raises StoreError naming file and line; given a list
    `rejected`, it is skipped and (line, reason) appended there. Lines count from 1. A last line that was torn by an
    interrupted write is logged, noted in `rejected`, and skipped; so are NUL bytes at the end, left by a power loss. Blank
    lines are skipped. places: gets the number of each returned row's line.
    """
    path = Path(path)
    lines = path.read_bytes().removeprefix(BOM_UTF8).rstrip(b"\0").split(b"\n")
    rows: list[Row] = []
    seen: dict[tuple[str, int], int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = validate(_decode(line))
            if "traj_idx" in row:
                key = row["prompt_id"], row["traj_idx"]
                _expect(key not in seen, _twice(key, seen.get(key, 0)))
                seen[key] = number
            rows.append(row)
            if places is not None:
                places.append(number)
        except StoreError as error:
            reason = str(error)
            if number == len(lines) and _is_torn(line):
                reason = "torn last line, left by an interrupted write"
                logger.warning("%s:%d: %s; skipped", path, number, reason)
            elif rejected is None:
                raise StoreError(f"{path}:{number}: {reason}") from None
            if rejected is not None:
                rejected.append((number, reason))
    used = set(seen)
    for row in rows:
        if "traj_idx" not in row:
            row["traj_idx"] = _next_index(row["prompt_id"], used)
            used.add((row["prompt_id"], row["traj_idx"]))
    return rows


def check_policy(rows: Iterable[Row], policy_hash: str) -> int:
    """Refuses rows that another policy sampled: their weights would be those of the wrong reference (A1).

    Returns how many rows do not say who sampled them (published files do not), for the caller to report. Raises
    StoreError with the first offending row; `drift.training.offpolicy` is the way to use such rows.
    """
    unknown = 0
    for row in rows:
        if "policy_hash" not in row:
            unknown += 1
        elif row["policy_hash"] != policy_hash:
            raise StoreError(
                f"prompt_id {row['prompt_id']!r}, traj_idx {row.get('traj_idx')} was sampled by policy "
                f"{row['policy_hash']!r}, not by the reference {policy_hash!r}; sample again from the reference, or "
                "have `drift train` correct the weights by weights.off_policy=correct (drift.training.offpolicy)"
            )
    return unknown


def _twice(key: tuple[str, int], line: int) -> str:
    return (
        f"prompt_id {key[0]!r}, traj_idx {key[1]} is on line {line} already; two processes may have written this file: "
        "move it away, and the same command samples it again"
    )


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too many brackets
        raise StoreError(f"not JSON in UTF-8: {error}") from None


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(_decode(line), dict)
    except StoreError:
        return False


def _is_torn(line: bytes) -> bool:
    """Whether this may be the beginning of a row: what is not (another program's file) is never cut off."""
    if not line.startswith(b"{"):
        return False
    try:
        _decode(line)
    except StoreError as error:
        return "Extra data" not in str(error)  # that is more than a row: several that other line ends divide, say
    return False


def _next_index(prompt_id: str, used: Container[tuple[str, int]]) -> int:
    index = 0
    while (prompt_id, index) in used:
        index += 1
    return index


# --- writing ---


class Writer:
    """Appends checked rows to a rollout file; a context manager.

    Opening makes the folder, cuts off a torn last line (and logs that), and reads what is there: `done` is the set of
    (prompt_id, traj_idx) on file. Until it is closed, no other process gets a Writer of the file. Every row is handed to
    the system at once; fsync=True also waits for the disk.
    Raises StoreError if the file holds a bad row, since a run should not go on from it, LockedError if another process
    writes to it, and WriteError if the system refuses.
    """

    def __init__(self, path: str | Path, fsync: bool = False):
        self.path, self.fsync = Path(path), fsync
        self.done: set[tuple[str, int]] = set()
        before = self.path.exists()
        self._lines = files.Lines(self.path)
        try:
            self._lines.hold()
            if before:
                _end_with_a_line(self.path)
                self.done = {(row["prompt_id"], row["traj_idx"]) for row in read(self.path)}
        except BaseException:
            self._lines.close()
            raise

    def write(self, row: Row) -> Row:
        """Checks and appends one row, and returns it as written; a missing `traj_idx` is the prompt's next.

        Raises StoreError for a bad row, and for a (prompt_id, traj_idx) that is in the file already; WriteError if it
        cannot be written, and then nothing of it is in the file.
        """
        row = validate(row)
        if "traj_idx" not in row:
            row["traj_idx"] = _next_index(row["prompt_id"], self.done)
        key = row["prompt_id"], row["traj_idx"]
        _expect(key not in self.done, f"prompt_id {key[0]!r}, traj_idx {key[1]} is in {self.path} already")
        self._lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
        if self.fsync:
            self.sync()
        self.done.add(key)
        return row

    def sync(self) -> None:
        """Has all rows reach the disk."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rewind(path: str | Path, step: int) -> int:
    """Cuts off an online training's rows from the first one past `step` on; returns how many lines went.

    For a training that goes on from a checkpoint of that step and will write those rows again. A torn last line goes
    too. A missing file has nothing to lose. Raises StoreError if a line is not JSON, or a row has no `step`: then
    another wrote the file.
    """
    path = Path(path)
    if not path.exists():
        return 0
    _end_with_a_line(path)
    kept = last = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        where, row = f"{path}:{number}", {"step": 0}
        if line.strip():
            try:
                row = _decode(line)
            except StoreError as error:
                raise StoreError(f"{where}: {error}") from None
        step_known = isinstance(row, dict) and _is_count(row.get("step"))
        _expect(step_known, f"{where}: the row has no step, so no online training wrote it; move the file away")
        _expect(
            not line.strip() or row["step"] >= last,
            f"{where}: step {row['step']} after step {last}; two processes wrote this file: remove the folder {path.parent}, "
            "and the same command does this training again",
        )
        last = row["step"] or last
        if row["step"] > step:
            os.truncate(path, kept)
            return len(lines) - number + 1
        kept += len(line)
    return 0


def _end_with_a_line(path: Path) -> None:
    """Makes the file end with a whole line: cuts off what a crash tore, and NUL bytes that a power loss left."""
    with files.writing(path), path.open("rb+") as file:
        content = file.read()
        whole = content.rstrip(b"\0")
        last = whole[whole.rfind(b"\n") + 1 :]
        torn = len(content) - len(whole)
        if not last.strip() or _is_torn(last):
            torn += len(last.strip() and last)
            whole = whole[: len(whole) - len(last)]
        if torn:
            logger.warning("%s: cut off a torn last line of %d bytes, left by an interrupted write", path, torn)
        file.truncate(len(whole))
        if whole and not whole.endswith(b"\n") and _is_whole(last):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
