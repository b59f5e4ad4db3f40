"""How kernels are launched: block, warps, stages and rows a program, by shape.

Rule for row kernels: 4,096 columns a block, or the vocabulary's next power of two if that is less; a warp for each 512
of them, so that a thread has 16 elements (four 16-byte loads) in flight and its running sums fit its registers; rows
shorter than two blocks share a program until it reads about 64 Ki logits (except in distillation).
If two rows are read side by side: 1,024 columns a block by 8 warps, since the arithmetic is heavy and more threads hide
it better than longer ones; it needs 40 registers at most. `top_k` has 2,048 columns a block by 8 warps: a column costs it a
64-bit key and two prefix sums.
Rule for the scorer: tiles of 128 rows by 128 columns and 64 of the width, 8 warps, 4 stages; 256 columns on sm_90 if Σe
is the only sum (a tile's state must fit the registers); 32 of the width and 3 stages on older GPUs, without
descriptors, for TF32 and for 64 rows or fewer; 64 by 64 for fp32 without TF32, which no tensor core multiplies.

The file that DRIFT_TUNING names overrides numbers by kernel, {"triton": {"row_stats": {"warps": 16}}}; the scorer's for more
than 64 rows of 16-bit operands alone, since a tile that fits those may not fit others. It is read at the first launch.
Nothing is tuned at import or at run time.

Pointers to data of a row or of its entries are slices of a batch's and begin anywhere. UNALIGNED names them, so that another
alignment compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from drift_kernels.backends.tuning import VARIABLE, tuning

KERNELS = ("row_stats", "grad_logits", "fused_policy", "score")
KERNELS += ("fused_distill", "top_k", "bucket_logprobs", "grad_buckets")
UNALIGNED = ["targets", "row_ptr", "inverses", "advantages", "old", "ref", "weights", "coefs", "lse_coefs", "lse"]
UNALIGNED += [
    "entropy_coefs",
    "entropy",
    "taught",
    "y_inverses",
    "y_lse",
    "ids",
    "ordered_ids",
    "dlogprobs",
    "rest",
    "drest",
]
ROW_BLOCK = 4096
ELEMENTS_A_WARP = 512
LOGITS_A_PROGRAM = 1 << 16
PAIR_BLOCK = 1024
KEY_BLOCK = 2048
FEW_ROWS = 64  # of hidden states, to the scorer


@dataclass(frozen=True)
class Launch:
    """The launch of one kernel. For the scorer `rows` and `block` are the tile's rows and columns, `depth` the width's."""

    block: int
    warps: int
    stages: int = 1
    rows: int = 1
    depth: int = 0


NUMBERS = tuple(f.name for f in fields(Launch))


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def row_rule(vocab: int) -> Launch:
    """The launch of a row kernel over `vocab` columns."""
    block = min(ROW_BLOCK, max(next_power_of_two(vocab), 128))
    rows = max(1, LOGITS_A_PROGRAM // max(vocab, 1)) if vocab < 2 * ROW_BLOCK else 1
    return Launch(block, max(1, block // ELEMENTS_A_WARP), 1, min(rows, 16))


def pair_rule(vocab: int) -> Launch:
    """The launch of a kernel that reads a student's row and its teacher's; a program takes one row."""
    block = min(PAIR_BLOCK, max(next_power_of_two(vocab), 128))
    return Launch(block, block // 128)


def key_rule(vocab: int) -> Launch:
    """The launch of `top_k`; programs take rows in turn."""
    block = min(KEY_BLOCK, max(next_power_of_two(vocab), 128))
    return Launch(block, max(1, block // 256))


RULES = {"fused_distill": pair_rule, "top_k": key_rule}  # of the other row kernels: row_rule


def score_rule(rows: int, kind: str, capability: tuple[int, int], described: bool, sums_only: bool) -> Launch:
    """The scorer's, over `rows` hidden rows. `kind` is "half", "tf32" or "ieee"; `described`, operands come by descriptors;
    `sums_only`, no sums but Σe are wanted."""
    if kind == "ieee":
        return Launch(64, 8, 2, 64, 32)
    if rows <= FEW_ROWS:
        return Launch(128, 4, 3, 64, 32)
    if kind == "tf32":
        return Launch(128 if described else 64, 8, 3, 128, 32)
    if not described:
        return Launch(128, 8, 3, 128, 32)
    wide = capability < (10, 0) and sums_only
    return Launch(256 if wide else 128, 8, 4, 128, 64)


def row_launch(kernel: str, logits: Tensor) -> Launch:
    """The launch of `kernel` over logits [C, V]."""
    return overridden(kernel, RULES.get(kernel, row_rule)(logits.shape[1]))


def score_launch(hidden: Tensor, kind: str, described: bool, sums_only: bool) -> Launch:
    """The launch of the scorer over hidden [T, D]."""
    rule = score_rule(hidden.shape[0], kind, capability(hidden.device), described, sums_only)
    chosen = overridden("score", rule)
    return chosen if kind == "half" and hidden.shape[0] > FEW_ROWS else rule


def overridden(kernel: str, rule: Launch) -> Launch:
    """`rule` with the tuning file's numbers; ValueError for a name that a launch does not have."""
    numbers = tuning("triton", KERNELS).get(kernel, {})
    for name, value in numbers.items():
        if name not in NUMBERS or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{VARIABLE}: {kernel}: {name}={value!r}; it must be one of {', '.join(NUMBERS)}, at least 1"
            )
    return replace(rule, **numbers)


@lru_cache(maxsize=32)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (9, 0) for a CPU, where the interpreter runs the kernels of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def options(launch: Launch) -> dict[str, Any]:
    """Options of the compiler. Multiplications are fused with additions in the scorer alone: in a row kernel a target's
    logit is made by scalar code, and must be bitwise the number that vector code put into the row's maximum and sums.
    """
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": launch.depth > 0}


def run(kernel: Any, programs: tuple[int, ...], like: Tensor, launch: Launch, arguments: dict[str, Any]) -> None:
    """Launches on the device of `like`, on its current stream."""
    if like.device.type == "meta" or 0 in programs:
        return
    if like.device.type != "cuda":
        kernel[programs](**arguments, **options(launch))
        return
    with torch.cuda.device(like.device):
        kernel[programs](**arguments, **options(launch))
