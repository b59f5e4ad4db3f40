"""Every Triton kernel compiled for six architectures: nothing spills, shared memory fits, tensor cores and 16-byte
accesses are used. The table goes to build/triton_kernels.json, which the documentation quotes.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aot
import pytest

pytestmark = pytest.mark.timeout(900)  # a minute on a machine of one's own
ROOT = Path(__file__).parents[2]
SHARED = {  # bytes a block may have; the compiler lets more pass
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90a": 227 << 10,
    "sm_100a": 227 << 10,
    "sm_120a": 99 << 10,
}
MULTIPLIES = {"sm_90a": "wgmma.mma_async", "sm_100a": "tcgen05.mma"}  # mma.sync on the others
WITHOUT_TMA = ("sm_80", "sm_86", "sm_89")
POPC, BAR = 32, 96  # at most, in the machine code of a kernel: a histogram by ballots has thousands
REGISTERS = 65_536  # of a multiprocessor


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """The lines of `aot.py`, compiled afresh, an architecture in a process without the interpreter, all cores at work."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}

    def compiled_for(architecture):
        path = folder / f"{architecture}.json"
        command = [sys.executable, "-W", "ignore", str(Path(aot.__file__)), str(path), str(architecture)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(path.read_text())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = [line for found in pool.map(compiled_for, aot.ARCHITECTURES) for line in found]
    path = ROOT / "build" / "triton_kernels.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(lines, indent=1))
    print(f"\n{'variant':26} {'kernel':20} {'target':8} registers  spilled  shared")
    for line in lines:
        print("{variant:26} {kernel:20} {target:8} {registers:9} {spilled:8} {shared:7}".format(**line))
    return lines


def name(line) -> str:
    return f"{line['variant']}, {line['kernel']}, {line['target']}"


def test_every_kernel_is_there_for_every_architecture(table):
    kernels = {"row_stats_kernel", "grad_logits_kernel", "fused_policy_kernel", "score_kernel"}
    kernels |= {"fused_distill_kernel", "top_k_kernel", "bucket_logprobs_kernel", "grad_buckets_kernel"}
    assert {(line["kernel"], line["target"]) for line in table} == {(k, t) for k in kernels for t in SHARED}


def test_nothing_spills_and_blocks_fit_the_multiprocessor(table):
    for line in table:
        # Triton 3.6 leaves some bytes of stack there
        assert line["spilled"] <= (32 if line["target"] == "sm_120a" else 0), name(line)
        assert line["popc"] <= POPC, name(line)
        assert line["bar"] <= BAR, name(line)
        assert line["shared"] <= SHARED[line["target"]], name(line)
        assert line["registers"] * 32 * line["warps"] <= REGISTERS, name(line)
        assert line["resident"] >= 1, name(line)


def test_common_row_kernels_leave_room_for_two_blocks(table):
    for line in table:
        if "all" not in line["variant"] and not line["variant"].startswith(("score", "policy, several")):
            assert line["registers"] <= 128, name(line)


def test_no_multiplication_of_a_row_kernel_is_fused_with_an_addition(table):
    """A gradient has no logarithm, whose own code holds fused ones."""
    plain = [line for line in table if line["variant"] == "gradient"]
    assert plain
    assert all(line["fused"] == 0 for line in plain), {name(line): line["fused"] for line in plain}


def test_rows_begin_at_offsets_of_64_bits(table):
    assert {name(line): line["narrow_rows"] for line in table if line["narrow_rows"]} == {}


def test_rows_are_read_and_written_sixteen_bytes_at_a_time(table):
    for line in table:
        if line["kernel"] == "score_kernel":
            continue
        writes = line["kernel"] in ("grad_logits_kernel", "grad_buckets_kernel")
        writes |= line["variant"] in ("policy", "policy, all, odd V")
        pair = line["kernel"] == "fused_distill_kernel"  # whose threads have four columns: eight bytes of a gradient
        listed = line["kernel"] == "top_k_kernel"  # eight columns a thread, two sweeps
        assert line["loads"].get("16", 0) >= (4 if pair or listed else 8), name(line)
        assert line["stores"].get("16", 0) >= (2 if writes else 0), name(line)
        if pair and "no gradient" not in line["variant"]:
            assert line["stores"].get("8", 0) >= 1, name(line)
        if "odd V" not in line["variant"]:  # whose last block alone has a mask
            assert line["loads"].get("4", 0) <= 8, name(line)


def test_the_scorer_multiplies_on_tensor_cores(table):
    for line in table:
        if line["kernel"] != "score_kernel":
            continue
        exact = line["variant"] == "score, fp32"
        assert (MULTIPLIES.get(line["target"], "mma.sync") in line["instructions"]) != exact, name(line)
        described = line["target"] not in WITHOUT_TMA and line["variant"] != "score, odd width"
        assert ("cp.async.bulk.tensor" in line["instructions"]) == described, name(line)
