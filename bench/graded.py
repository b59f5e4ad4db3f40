"""Partial credit for sums, for `task.scorer`: `bench.graded:digits` (bench/graded.yaml)."""


def digits(answer: str, gold: str, problem: dict) -> float:
    """1 for the right number, half the share of right digits for another of the same length, 0 otherwise."""
    if answer == gold:
        return 1.0
    if len(answer) != len(gold):
        return 0.0
    return 0.5 * sum(a == b for a, b in zip(answer, gold)) / len(gold)
