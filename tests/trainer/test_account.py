"""What is said about trajectories before training, and when it is that nothing can be learned."""

from __future__ import annotations

import pytest

from drift.config import WeightsConfig
from drift.rollouts.account import account, expected

END = 9


def row(prompt, right, answers=("x",), ids=(1, 2, END), mask=(0, 1, 1)):
    rewards = {f"t{turn}": 0.0 for turn in range(1, len(answers) + 1)} | ({f"t{len(answers)}": 1.0} if right else {})
    return {
        "prompt_id": prompt,
        "turn_rewards": rewards,
        "answer_norms": [answer for answer in answers if answer],
        "format_penalty": -0.1 * sum(not answer for answer in answers),
        "t_star": len(answers) if right else None,
        "token_ids": list(ids),
        "loss_mask": list(mask),
    }


def said(*rows):
    found = account(rows, WeightsConfig(), {END})
    return found.line("<answer>…</answer>", 8), found.warning("<answer>…</answer>")


def test_the_line_counts_solved_unparsed_flat_groups_and_cut_turns():
    cut = row("b", False, ("", "y"), ids=(1, 2, 3, 4, END), mask=(0, 1, 1, 0, 1))
    line, warning = said(row("a", True), row("a", False), cut, row("b", False, ("", "y")))
    assert line == (
        "1 of 4 trajectories are solved (25%); 2 of 6 answers could not be read (expected <answer>…</answer>); 1 of 2 groups "
        "have no spread in their returns; 1 trajectories have a turn that was cut at 8 tokens"
    )
    assert warning is None


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [row("a", False, ("",))] * 2,
            "nothing can be learned.*2 of 2 answers could not be read, which must read <answer>",
        ),
        ([row("a", True)] * 2, "nothing can be learned: every trajectory is right; take harder problems"),
        ([row("a", False)] * 2, "no group has any spread in its returns, and 0 are right: take easier problems"),
        (
            [row("a", False), row("a", False, ("",))],
            "no trajectory is right, so only form and repetition can be learned",
        ),
        ([row("a", False, ids=(1, 2, 3))] * 2, "2 of 2 trajectories were cut; raise rollout.max_new_tokens"),
        (
            [row("a", True), row("a", True), row("b", False), row("b", False)],
            "no group has any spread.*and 2 are right",
        ),
    ],
)
def test_nothing_to_learn_is_said_with_a_remedy(rows, words):
    import re

    assert re.search(words, said(*rows)[1])


def test_what_is_expected_of_an_answer_follows_from_the_parser():
    assert expected("strict", "a") == "<think>…</think><a>…</a>"
    assert expected("lenient", "a") == "<a>…</a>"


def test_partial_rewards_are_something_to_learn():
    partial = row("a", False) | {"turn_rewards": {"t1": 0.5}}
    assert said(partial, row("a", False))[1] is None
