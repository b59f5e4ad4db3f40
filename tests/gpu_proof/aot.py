"""Compiles every Triton kernel for GPUs that are not there, with the arguments that the backend itself would launch it with.

    python aot.py RESULT.json [80 90 …]

Writes for each variant and architecture: registers, spilled bytes, shared memory, programs a multiprocessor holds, how often
POPC and BAR occur in the machine code, fused multiply-adds in the PTX, and which instructions were used. Runs in a process of
its own: under TRITON_INTERPRET kernels are Python functions and cannot be compiled.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from drift_kernels.backends import triton as backend
from drift_kernels.backends.contract import BucketSlopes, Chunk, Coefs, TeacherChunk
from drift_kernels.backends.triton import launch, scorer
from drift_kernels.calls import HeadOptions
from drift_kernels.formulas import Tokens
from drift_kernels.spec import PolicySpec

ARCHITECTURES = {80: (8, 0), 86: (8, 6), 89: (8, 9), 90: (9, 0), 100: (10, 0), 120: (12, 0)}  # sm_90a, 100a, 120a
ROOM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB of a multiprocessor's shared memory
WARPS = {80: 64, 90: 64, 100: 64}  # that it holds; 48 on the others
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor", "cp.async.cg")
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that has everything but memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def captured(call: Callable[[], object]) -> list[tuple[Any, launch.Launch, dict[str, Any]]]:
    """(kernel, launch, arguments) of every launch that `call` makes."""
    launches: list[tuple[Any, launch.Launch, dict[str, Any]]] = []

    def record(kernel, programs, like, chosen, arguments):
        launches.append((kernel, chosen, arguments))

    modules = [m for m in sys.modules.values() if getattr(m, "run", None) is launch.run]
    original = launch.run
    for module in modules:
        module.run = record
    try:
        call()
    finally:
        for module in modules:
            module.run = original
    return launches


def source(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """What the just-in-time compiler would make of these arguments: aligned pointers, multiples of 16, ones, Nones."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple):
            signature[name] = type(value)(*["fp32"] * len(value))
        else:
            signature[name] = "fp32"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def specialisation(kernel: Any, arguments: dict[str, Any]) -> str:
    """What the just-in-time compiler tells apart: types, constants, and whether numbers and addresses are multiples of 16."""
    made, odd = source(kernel, arguments), []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor) and value.data_ptr() % 16 and not parameter.do_not_specialize_on_alignment:
            odd.append(parameter.name)
    return repr((made.signature, made.constants, made.attrs, odd))


def dumped(cubin: bytes, option: str) -> str:
    """What cuobjdump says of it."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory, which is where spills go; POPC and BAR in the machine code."""
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dumped(cubin, "-res-usage"))}
    code = dumped(cubin, "-sass")
    return numbers | {name: len(re.findall(rf"\b{name}\b", code)) for name in ("POPC", "BAR")}


def resident(architecture: int, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at a time: by its 65,536 registers, shared memory and warps."""
    room, held = ROOM[architecture] << 10, WARPS.get(architecture, 48)
    return min(65_536 // (-(-registers // 8) * 8 * 32 * warps), room // (shared + 1024), held // warps)


def compiled(kernel: Any, chosen: launch.Launch, arguments: dict[str, Any], architecture: int) -> dict[str, Any]:
    """One line of the table."""
    begun = time.perf_counter()
    options = launch.options(chosen)
    made = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", architecture, 32), options=options)
    seconds = time.perf_counter() - begun
    ptx = made.asm["ptx"]
    found = usage(made.asm["cubin"])
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    return {
        "kernel": kernel.__name__,
        "target": target.group(1),
        "registers": found["REG"],
        "spilled": found["STACK"] + found.get("LOCAL", 0),
        "popc": found["POPC"],
        "bar": found["BAR"],
        "shared": made.metadata.shared,
        "warps": made.metadata.num_warps,
        "resident": resident(architecture, found["REG"], made.metadata.shared, made.metadata.num_warps),
        "fused": len(re.findall(r"\bfma\.rn", ptx)),
        "narrow_rows": [] if chosen.depth else narrow_rows(made.asm["ttir"]),
        "loads": wide("ld.global", ptx),
        "stores": wide("st.global", ptx),
        "instructions": [name for name in INSTRUCTIONS if name in ptx],
        "seconds": round(seconds, 2),
    }


def narrow_rows(ttir: str) -> list[str]:
    """Where the first address of a row is not made by a product of 64 bits: row · stride passes 2³¹ at 14,000 rows of 151,936."""
    wrong, found = [], 0
    for start in re.finditer(r"tt\.addptr %(x|y|out)(?:_\d+)?, (%\S+) : !tt\.ptr<\w+>, (i\d+)", ttir):
        name, offset, bits = start.groups()
        made = re.findall(rf"^\s*{re.escape(offset)} = (.*)$", ttir[: start.start()], re.MULTILINE)[-1:]
        found += 1
        if bits != "i64" or not made or not re.match(r"arith\.muli .* : i64", made[0]):
            wrong.append(f"{name}: {bits}, {made}")
    return wrong if found else ["no row begins anywhere"]


def wide(instruction: str, ptx: str) -> dict[str, int]:
    """How many reads or writes of global memory there are, by bytes a thread."""
    sizes: dict[str, int] = {}
    for vector, bits in re.findall(instruction + r"[a-z0-9_.:]*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        size = str(int(vector or 1) * int(bits) // 8)
        sizes[size] = sizes.get(size, 0) + 1
    return sizes


EVERYTHING = (
    "logprobs",
    "lse",
    "entropy",
    "is_top1",
    "mean_logits",
    "log_sum_sq_probs",
    "loss",
    "ratio",
    "kl",
    "clipped",
)
FULL = PolicySpec(kl_coef=0.1, entropy_coef=0.01, z_loss_coef=1e-3, dual_clip=3.0)


def chunk(
    rows: int, vocab: int, *, bias: bool = False, several: bool = False, head: HeadOptions = HeadOptions()
) -> Chunk:
    """Entries of `rows` hidden rows."""
    entries = 2 * rows if several else rows
    return Chunk(
        meta(entries, dtype=torch.int64),
        meta(rows + 1, dtype=torch.int64) if several else None,
        meta(rows) if bias else None,
        meta(vocab) if bias else None,
        head,
    )


def row_variants() -> dict[str, Callable[[], object]]:
    """The row kernels as training calls them: at a common vocabulary, at an odd one (whose rows are padded), with everything
    on, with several targets a row."""
    C, V, odd = 512, 151_936, 131_075
    x, y = meta(C, V), meta(C, odd + 13)[:, :odd]
    out, half = meta(C, V, dtype=torch.bfloat16), meta(C, odd + 13, dtype=torch.float16)[:, :odd]
    one, per_row, capped = meta(C), meta(2 * C), HeadOptions(softcap=30.0, logit_scale=0.5)

    def policy(logits, made, spec, want, out, entries):
        return backend.fused_policy(logits, made, spec, Tokens(entries, entries, entries, entries), want, out=out)

    return {
        "stats": lambda: backend.row_stats(x, chunk(C, V), ("logprobs", "lse")),
        "stats, all, odd V": lambda: backend.row_stats(y, chunk(C, odd, bias=True, head=capped), EVERYTHING[:6]),
        "gradient": lambda: backend.grad_logits(x, chunk(C, V), Coefs(one, one), raw=True, out=out),
        "gradient, all, odd V": lambda: backend.grad_logits(
            y, chunk(C, odd, bias=True, several=True, head=capped), Coefs(one, per_row, one, one), raw=True, out=half
        ),
        "policy": lambda: policy(x, chunk(C, V), PolicySpec(), ("loss", "clipped"), out, one),
        "policy, no gradient": lambda: policy(x, chunk(C, V), PolicySpec(), ("loss",), None, one),
        "policy, all, odd V": lambda: policy(y, chunk(C, odd, bias=True, head=capped), FULL, EVERYTHING, half, one),
        "policy, several targets": lambda: policy(x, chunk(C, V, several=True), FULL, EVERYTHING, out, per_row),
    }


def distill_variants() -> dict[str, Callable[[], object]]:
    """Distillation as training calls it: over the vocabulary, over a hundred tokens; and at an odd vocabulary with everything
    on."""
    C, V, odd, k = 512, 151_936, 131_075, 100
    x, y, one = meta(C, V), meta(C, odd + 13)[:, :odd], meta(C)
    out, half = meta(C, V, dtype=torch.bfloat16), meta(C, odd + 13, dtype=torch.float16)[:, :odd]
    taught, ids, few = meta(C, dtype=torch.int64), meta(C, k, dtype=torch.int64), meta(C, k)
    capped = HeadOptions(softcap=30.0, logit_scale=0.5)
    plain, full = chunk(C, V), chunk(C, odd, bias=True, head=capped)

    def distill(alpha, gradient=True):
        return backend.fused_distill(
            x, plain, Coefs(one), TeacherChunk(x, plain, one), one, alpha, out=out if gradient else None
        )

    return {
        "KL(t‖s)": lambda: distill(0.0),
        "KL(s‖t)": lambda: distill(1.0),
        "JSD": lambda: distill(0.5),
        "JSD, no gradient": lambda: distill(0.5, gradient=False),
        "JSD, all, odd V": lambda: backend.fused_distill(
            y, full, Coefs(one, one, one, one, one), TeacherChunk(y, full, one, taught), one, 0.5, out=half
        ),
        "top k": lambda: backend.top_k(x, plain, None, C, k),
        "top k, all, odd V": lambda: backend.top_k(y, full, taught, C, k),
        "bucket log-probs": lambda: backend.bucket_logprobs(x, plain, None, one, ids, True),
        "bucket log-probs, all, odd V": lambda: backend.bucket_logprobs(y, full, taught, one, ids, True),
        "buckets": lambda: backend.grad_buckets(x, plain, Coefs(one), None, BucketSlopes(ids, few, one, one), out=out),
        "buckets, all, odd V": lambda: backend.grad_buckets(
            y, full, Coefs(one, one, one, one, one), taught, BucketSlopes(ids, few, one, one), out=half
        ),
    }


def score_variants() -> dict[str, Callable[[], object]]:
    """The scorer as evaluation calls it, and at an odd width, where there are no descriptors."""
    T, D, V = 8192, 4096, 151_936

    def score(T, D, dtype, want, made, allowed=False):
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        hidden, weight = meta(T, D, dtype=dtype), meta(made[0], D, dtype=dtype)
        return backend.score(hidden, weight, made[1], want)

    plain, head = (V, chunk(T, V)), HeadOptions(softcap=30.0, logit_scale=0.5)
    full = (131_075, chunk(T, 131_075, bias=True, head=head))
    half, single = torch.bfloat16, torch.float32
    return {
        "score": lambda: score(T, D, half, ("logprobs", "lse"), plain),
        "score, fp16, all": lambda: score(T, D, torch.float16, EVERYTHING[:6], full),
        "score, odd width": lambda: score(T, 4095, half, ("logprobs",), plain),
        "score, 64 rows": lambda: score(64, D, half, ("logprobs", "entropy"), (V, chunk(64, V))),
        "score, TF32": lambda: score(T, D, single, ("logprobs", "entropy"), plain, allowed=True),
        "score, fp32": lambda: score(T, D, single, ("logprobs", "entropy"), plain),
    }


def main(path: str, *architectures: str) -> None:
    """Compiles all variants for all architectures, or for those named, and writes the table."""
    lines = []
    for architecture, capability in ARCHITECTURES.items():
        if architectures and str(architecture) not in architectures:
            continue
        launch.capability = scorer.capability = lambda device, value=capability: value
        for variant, call in (row_variants() | distill_variants() | score_variants()).items():
            for kernel, chosen, arguments in captured(call):
                lines.append({"variant": variant, **compiled(kernel, chosen, arguments, architecture)})
    pathlib.Path(path).write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
