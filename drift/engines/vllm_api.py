"""What a vLLM server is started with, and how its answers are read: nothing is taken for granted that they lack.

A completion's `choices` carry `token_ids` (return_token_ids), `prompt_token_ids` and `logprobs.token_logprobs`; a chat's
`logprobs.content[].logprob`, with `prompt_token_ids` beside `choices`.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from drift.engines import Sample
from drift.engines.client import Passing, Refused

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
ROUNDING = 1e-3  # by which a log-prob may come out above 0


class State(NamedTuple):
    """What the server's workers say of themselves."""

    start: tuple[str, ...]  # of each worker process: another one after a restart
    version: str | None  # of the weights; None if workers disagree, or hold those that they were started with
    vocabulary: int


@dataclass(frozen=True)
class Answer:
    prompts: list[list[int]]  # ids that each choice continues
    samples: list[Sample]


def server_command(
    model: str | Path,
    *,
    url: str = "http://127.0.0.1:8000",
    dtype: str = "float32",
    lora_rank: int = 0,
    cpu: bool = False,
    python: str = "python",
) -> str:
    """The shell command of a server that `VLLMEngine` can use.

    model      the folder of a model of the policy's shape; for LoRA the base itself
    lora_rank  of the policy's adapters; 0 for none
    cpu        what vLLM needs on a CPU
    python     the interpreter of vLLM's environment, where `drift` has to be importable too
    """
    host, _, port = url.removesuffix("/").rpartition("//")[2].partition(":")
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # the routes that hand weights over
    served = Path(model).resolve() if Path(model).is_dir() else model
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served)]
    words += ["--host", host, "--port", port or "80", "--dtype", dtype]
    words += ["--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "drift.engines.vllm_worker.Weights"]
    if lora_rank:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        words += ["--enable-lora", "--max-lora-rank", str(next((r for r in LORA_RANKS if r >= lora_rank), lora_rank))]
    if cpu:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        words += ["--enforce-eager", "--max-num-batched-tokens", "16384"]  # a seeded prefill in chunks kills it (0.32)
    return shlex.join([f"{name}={value}" for name, value in environment.items()] + words)


def read_state(answer: Any) -> State:
    """Raises Refused if the workers' answer is not that of `vllm_worker`."""
    try:
        found = answer["results"]
        versions = {worker["version"] for worker in found}
        version = versions.pop() if len(versions) == 1 else None
        return State(tuple(worker["start"] for worker in found), version, int(found[0]["vocabulary"]))
    except (KeyError, IndexError, TypeError) as error:
        raise Refused(f"its workers do not have drift's extension: {str(answer)[:200]}", 200) from error


def read_answer(
    answer: Any, n: int, ends: frozenset[int], prompt: list[int] | None, path: str, vocabulary: int
) -> Answer:
    """The choices of an answer, by their index. Raises Refused if it lacks something or holds what no model of this
    vocabulary samples, Passing if a sample was cut off."""

    def lacks(what: str) -> Refused:
        return Refused(f"{path} gave {what}", 200)

    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        raise lacks("no choices")
    if len(choices) != n:
        raise lacks(f"{len(choices)} choices where n={n} were asked for")
    ordered = {choice.get("index", place): choice for place, choice in enumerate(choices) if isinstance(choice, dict)}
    if ordered.keys() != {*range(n)}:
        raise lacks(f"choices {list(ordered)} where each of 0…{n - 1} should be there once")
    found = Answer([], [])
    for choice in (ordered[place] for place in range(n)):
        if choice.get("finish_reason") not in ("stop", "length"):
            raise Passing(f"{path}: a sample ended by {choice.get('finish_reason')!r}")
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            raise lacks("no token ids (return_token_ids)")
        if not ids or not all(type(token) is int and 0 <= token < vocabulary for token in ids):
            raise lacks(f"token ids {str(ids)[:80]}; there should be one at least, each in [0, {vocabulary})")
        given = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
        if not isinstance(given, list) or (prompt is not None and given != prompt):
            raise lacks("other prompt ids than it was sent" if isinstance(given, list) else "no prompt ids")
        logprobs = _logprobs(choice.get("logprobs"))
        if logprobs is None or len(logprobs) != len(ids) or any(value is None for value in logprobs):
            raise lacks("no log-prob for each token id (logprobs)")
        if not all(type(value) in (int, float) and -math.inf < value <= ROUNDING for value in logprobs):
            raise lacks(f"log-probs {str(logprobs)[:80]}; each should be finite and at most 0")
        found.prompts.append(given)
        found.samples.append(Sample(ids, logprobs, ids[-1] in ends))
    return found


def _logprobs(given: Any) -> list[Any] | None:
    """Of a completion, {"token_logprobs": […]}, or of a chat, {"content": [{"logprob": …}, …]}."""
    if not isinstance(given, dict):
        return None
    if isinstance(content := given.get("content"), list):
        return [token.get("logprob") if isinstance(token, dict) else None for token in content]
    return listed if isinstance(listed := given.get("token_logprobs"), list) else None
