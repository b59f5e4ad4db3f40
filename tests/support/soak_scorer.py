"""A scorer that runs in worker processes, for a run whose workers are killed."""


def right(answer: str, gold: str, problem: dict) -> float:
    return float(answer.strip() == gold)
