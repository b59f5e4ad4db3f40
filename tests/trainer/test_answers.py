"""Verdicts on answers by the kind of the gold answer: a table, with the reason for each verdict that is open to argument."""

# ruff: noqa: E501  the tables read better in long lines

from __future__ import annotations

import pytest

from drift.scoring import actions, choice
from drift.scoring.answers import clean, exact
from drift.tasks.scorers import Failed, MathScorer
from drift.types import Problem

R, W = True, False  # right, wrong
NUMBERS = [
    ("5", "5", R), ("5", " 5\n", R), ("5", "5.", R), ("5", "**5**", R), ("5", "`5`", R), ("5", "$5$", R), ("5", r"\(5\)", R),
    ("5", r"\boxed{5}", R), ("5", "The answer is 5.", R), ("5", "Answer: 5", R), ("5", "So, the final answer is **5**.", R),
    ("5", "= 5", R), ("5", "+5", R), ("5", "(5)", R), ("5", "5.0", R), ("5", "05", R), ("5", "x = 5", R), ("5", "10/2", R),
    ("5", "-5", W), ("-5", "−5", R), ("-5", "5", W), ("5", "50", W), ("50", "5", W), ("5", "15", W), ("5", "5 6", W),
    ("5", "five", W),  # the right number in words is rare, and "five" of "twenty-five" is worse than a miss
    ("5", "not 5", W), ("5", "The answer is not 5.", W), ("5", "not 4 but 5", W), ("5", "maybe 5", W), ("5", "5?", W),
    ("5", "5 or 6", W), ("5", "3 or 4 or 5", W), ("5", "4, 5", W), ("5", "4 and 5", W), ("5", "5, 5", W), ("5", "> 5", W),
    ("5", "2+3", W),  # still to be worked out: an answer is a value
    ("5", "10 - 5", W), ("5", "5!", W), ("5", "at least 5", W), ("5", "5 < x", W), ("5", "", W), ("5", "nothing", W),
    ("5", "~5", W), ("5", "≈ 5", W), ("5", "5...", W), ("5", "⑤", R), ("5", "５", R), ("5", "5²", W), ("25", "5²", W), ("5", "5^2", W),
    ("1000", "1,000", R), ("1,000", "1000", R), ("1000", r"1{,}000", R), ("1000", "1, 000", W), ("1000000", "1,000,000", R),
    ("1000", "1.000", W),  # a point is a decimal point
    ("24", "2 4", W), ("24", "2,4", W), ("24", "2.4", W), ("100000", "1e5", R), ("100000", "10^5", R), ("100000", r"10^{5}", R),
    ("300000", r"3 \times 10^5", R), ("300000", "3*10^5", R), ("300000", "3 x 10^5", R), ("0.003", r"3\times10^{-3}", R),
    ("3", "3.0001", W), ("3.14", "3.14159", W), ("3.14", "3.140", R), ("0.5", "1/2", R), ("1/2", "0.5", R), ("1/2", ".5", R),
    (r"\frac{1}{2}", "1/2", R), (r"\frac12", "1/2", R), (r"\dfrac{1}{2}", r"\frac{1}{2}", R), (r"-\frac{1}{2}", "-0.5", R),
    ("1/2", "2/4", R), ("3/2", "1 1/2", R), ("3/2", r"1\frac{1}{2}", R), ("3/2", "1½", R), ("3/2", "11/2", W), ("1/2", "½", R),
    ("1/3", "0.3333", R),  # an endless fraction cut at its fourth digit or later, and rounded
    ("1/3", "0.333", W), ("1/3", "0.3334", W), ("0.333", "1/3", W), ("2/3", "0.6667", R), ("2/3", "0.6666", W),
    ("1/0", "1", W), ("1", "1/0", W), ("0", "0.0", R), ("0", "-0", R), ("0", "00", R), ("1e400", "1e400", R), ("5", "1e999999999", W),
    ("9" * 50, "9" * 50, R), ("9" * 50, "9" * 49 + "8", W), ("0.1", "0.1000000000000000055", W),
]  # fmt: skip
UNITS = [
    ("50%", "50%", R), ("50%", "0.5", R), ("0.5", "50%", R),
    ("50%", "50", R),  # the question asked for percent
    ("50", r"50\%", R), ("50%", "5%", W), ("50%", "0.05", W), ("50%", "5000%", W), ("5", "5 percent", R),
    ("7 dollars", "7", R), ("7 dollars", "$7", R), ("7 dollars", r"\$7", R), ("7 dollars", "8 dollars", W), ("$7", "7 dollars", R),
    ("7", "$7", R), ("7", "-$7", W), ("7 dollars", "7 cents", W), ("7 dollars", "7 euros", W), ("7 cm", "7 m", W), ("7 cm", "7", R),
    ("7", r"7\text{ cm}", R),  # the unit that the question implies
    ("7 m", "7 meters", R), ("90", r"90^\circ", R), (r"90^\circ", "90 degrees", R), ("90°", "90", R), ("12 hours", "12 h", R),
    ("5", "5 apples", W),  # no unit: "5 apples" may be all but one of six
    ("5", "5 million", W), ("5", "5 dozen", W), ("100 cm", "1 m", W),  # units are not converted
    ("36", "36 square units", R), ("36", r"36\text{ cm}^2", R),
]  # fmt: skip
PARTS = [
    ("1331 and 1728", "1331 and 1728", R), ("1331 and 1728", "1728 and 1331", R), ("1331 and 1728", "1331, 1728", R),
    ("1331 and 1728", "1728", W), ("1331 and 1728", "1331", W), ("1331 and 1728", "1, 1331, 1728", W), ("1331 and 1728", "1331 and 1729", W),
    ("1, 2, 3", "3, 2, 1", R), ("1, 2, 3", "1, 2, and 3", R), ("1, 2, 3", "1 2 3", W), ("1,2", "1,2,2", W), ("1, 1, 2", "1, 2, 2", W),
    ("3", "3, 3", W), (r"\pm 3", "3, -3", R), (r"3, -3", r"\pm 3", R), ("±3", "3", W), ("1/2, 3", "3, 0.5", R), ("x=1 or x=2", "1, 2", R),
    ("1, 2", "x = 2 or x = 1", R), ("(0,1)", "(0, 1)", R), ("(0,1)", "[0,1]", W), ("(0,1]", "(0,1)", W), ("(0,1)", "(1,0)", W), ("(0,1)", "0, 1", W),
    ("0, 1", "(0, 1)", W),  # a pair is not two answers
    (r"\{1, 2\}", r"\{2, 1\}", R), ("{1, 2}", "{1, 3}", W), ("(1, 2), (3, 4)", "(3, 4), (1, 2)", R), ("(1, 2), (3, 4)", "(1, 2)", W),
    (r"(1, \frac{1}{2})", "(1, 0.5)", R), ("(1,331, 2)", "(1331, 2)", W),
]  # fmt: skip
TEXT = [
    ("north", "North", R), ("north", "**north**", R), ("north", '"north"', R), ("north", "north!", R), ("north", "The answer is North.", R),
    ("north", "south", W), ("north", "not north", W), ("north", "north or south", W), ("north", "north south", W), ("north", "five", W),
    ("True", "true", R), ("True", "False", W), ("yes", "no", W), ("yes", "yes and no", W), ("Monday", "Tuesday", W), ("hello", "goodbye", W),
    ("hello world", "hello  world", R), ("hello world", "world hello", W), ("hello world", "helloworld", W), ("dog cat", "cat dog", W),
    ("abc", "cba", W), ("ab", "ba", W), ("cat", "act", W), ("silent", "listen", W), ("a b", "b a", W), ("x", "y", W), ("b", "a", W),
    ("A", "A.", R), ("A", "(A)", R), ("A", "a", R), ("A", "B", W), ("A", "A or B", W), ("A", r"\text{A}", R), ("C", r"\textbf{(C)}", R),
    ("2024-05-06", "2024-05-06", R), ("2024-05-06", "2024-06-05", W), ("2024-05-06", "2013", W), ("05/06/2024", "06/05/2024", W),
    ("12:30", "12:30", R), ("12:30", "12:31", W), ("12:30", "12", W), ("12:30", "30", W), ("12:30 PM", "12:30 pm", R), ("3:2", "1.5", W),
    ("555-12-34", "555-12-34", R), ("555-12-34", "509", W), ("555-12-34", "555-34-12", W), ("+1 (555) 123-4567", "+1 (555) 123-4576", W),
    ("1.10.2", "1.10.2", R), ("1.10.2", "1.1.2", W), ("192.168.0.1", "192.168.0.1", R), ("1990-1995", "-5", W),
    ("007", "007", R),  # leading zeros: a code
    ("007", "7", W), ("Paris, France", "Paris, France", R), ("Paris, France", "Paris", W), ("May 5, 2024", "may 5, 2024", R),
    ("1010_2", "1010_{2}", W),  # spelt otherwise; bases are not converted
    ("1010_2", "10", W), ("café", "cafe\u0301", R), ("gold is 7", "7", W), ("7", "gold is 7 or 5", W), ("red and blue", "red", W),
]  # fmt: skip
ALGEBRA = [
    ("x+1", "1+x", R), ("x+1", "x-1", W), ("2x", "x+x", R), (r"\frac{x}{2}", "0.5x", R), (r"\sqrt{2}", r"\sqrt{2}", R), (r"2\sqrt{3}", r"\sqrt{12}", R),
    (r"\sqrt{2}", "1.414", W), (r"\frac{\pi}{2}", r"\pi/2", R), (r"\pi", "3.14159", W), ("y = 2x + 1", "y = 1 + 2x", R), ("y = 2x + 1", "y = 2x", W),
    ("x^2", "x²", R), ("x^2", "x2", W), (r"\sin x", r"\cos x", W), ("x+1", "not x+1", W), ("x+1", "x+1 or x-1", W),
]  # fmt: skip


@pytest.fixture(scope="module")
def scorer():
    scorer = MathScorer(workers=1, seconds=60)
    yield scorer
    scorer.close()


@pytest.mark.parametrize(
    "table", [NUMBERS, UNITS, PARTS, TEXT, ALGEBRA], ids=["numbers", "units", "parts", "text", "algebra"]
)
def test_verdicts(scorer, table):
    verdicts = scorer.score([(Problem("p", "", gold), answer) for gold, answer, _ in table])
    assert not [verdict for verdict in verdicts if isinstance(verdict, Failed)]
    assert [(g, a) for (g, a, right), verdict in zip(table, verdicts) if (verdict == 1.0) != right] == []


def test_the_table_is_large_and_only_algebra_asks_a_worker():
    assert sum(map(len, (NUMBERS, UNITS, PARTS, TEXT, ALGEBRA))) >= 240
    scorer = MathScorer()
    asked = [(g, a) for g, a, _ in [*NUMBERS, *UNITS, *TEXT] if scorer._decided(g, a) is None]
    assert asked == []


def test_a_tolerance_is_for_gold_numbers_that_are_not_whole():
    scorer = MathScorer(tolerance=0.04)
    pairs = [("3.14", "3.2", R), ("3.14", "3.3", W), ("3", "3.01", W), ("3", "3.0", R), ("-0.5", "0.5", W), ("0.5 m", "0.51 m", R), ("0.5 m", "0.5 s", W),
             ("True", "true", R), ("[1, 2]", "[1, 2]", R), ("[1, 2]", "[1, 3]", W)]  # fmt: skip
    verdicts = scorer.score([(Problem("p", "", gold), answer) for gold, answer, _ in pairs])
    assert verdicts == [float(right) for *_, right in pairs]


@pytest.mark.parametrize(
    "answer", ["±" * 4000, "\\boxed{" * 500, "(" * 3999, "= " * 1900, "1," * 1999, "*" * 3999, "$" * 3999, "a" * 4001, "9" * 3999, "5 " * 1999]
)  # fmt: skip
def test_long_nests_are_wrong_and_neither_raise_nor_take_long(answer):
    assert MathScorer()._decided("5", answer) == 0.0
    clean(answer)


def test_exact_is_the_published_rule():
    assert exact("The Answer", " theanswer\n")
    assert not exact("5", "5.0")
    assert not exact("", "")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("[B]", "B"), ("B.", "B"), ("B)", "B"), ("**B**", "B"), (r"\boxed{B}", "B"), (r"\boxed{\text{(B)}}", "B"),
        ("B. Paris", "B"), ("B) Paris", "B"), ("(B) Paris and Rome", "B"), ("B: Paris", "B"), ("B - Paris", "B"), ("Option B", "B"),
        ("The answer is B.", "B"), ("The correct answer is (B)", "B"), ("The correct option is B", "B"), ("Answer: B", "B"), ("J", "J"),
        ("A or B", None), ("A, B", None), ("A and B", None), ("AB", None), ("not B", None), ("The answer is not B", None), ("K", None), ("", None),
        ("A dog", None), ("I think so", None), ("B. or C.", None), ("Paris", None), ("neither A nor B", None), ("B" * 5000, None),
    ],
)  # fmt: skip
def test_an_option_is_one_letter_where_a_choice_stands(answer, letter):
    assert choice.option(answer) == letter


def test_a_choice_is_right_by_its_letter():
    assert choice.chosen("(C)", "C. Rome")
    assert not choice.chosen("C", "B")
    assert choice.chosen("Paris", "paris.")
    assert not choice.chosen("", "")


CALLS = '[{"name": "add", "arguments": {"a": 1, "b": [2]}}, {"name": "show", "arguments": {}}]'


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (CALLS, R),
        ('[{"name": "show"}, {"name": "add", "arguments": {"b": [2], "a": 1.0}}]', R),
        ('Thought: …\nAction: add\nAction Input: {"a": 1, "b": [2]}\nAction: show\nAction Input: {}', R),
        (
            '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [2]}"}</tool_call><tool_call>{"name": "show"}</tool_call>',
            R,
        ),
        (f"```json\n{CALLS}\n```", R),
        ('[{"name": "add", "arguments": {"a": 1, "b": [2]}}]', W),
        ('[{"name": "add", "arguments": {"a": 2, "b": [2]}}, {"name": "show"}]', W),
        ('[{"name": "add", "arguments": {"a": 1, "b": [2]}}, {"name": "show"}, {"name": "show"}]', W),
        ('[{"name": "add", "arguments": {"a": "1", "b": [2]}}, {"name": "show"}]', W),
        ("add and show", W),
        ("[" * 9000, W),
        ("", W),
    ],
)
def test_tool_calls_are_a_multiset_of_names_with_merged_arguments(answer, right):
    assert actions.same(CALLS, answer) is right
