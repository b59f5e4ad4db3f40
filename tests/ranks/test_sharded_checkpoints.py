"""Checkpoints of a spread model: 4 ranks → 2 → 1 → 4 to the same bits, damage, and a rank that cannot write."""

import json
import resource
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torchrun
from safetensors.torch import load_file, save_file
from test_offline_ranks import close
from test_sharded import UNTIED
from tiny_policy import Policy, config
from torch.distributed.checkpoint import FileSystemReader

from drift import files
from drift.training import checkpoint, distributed, sharding
from drift.training.optimizer import MasterAdamW

JOB = {"seed": 7}


def made(step, optimizer, teacher):
    """Two steps along gradients that do not depend on the number of ranks; the teacher is what the first one gave."""
    draw = torch.Generator().manual_seed(1)
    for number in range(step):
        for parameter in optimizer.parameters:
            parameter.grad = sharding.like(torch.randn(parameter.shape, generator=draw), parameter)
        optimizer.step(1e-2)
        if number == 0:
            teacher |= {name: m.detach().clone() for name, m in optimizer.masters.items()}


def everything(optimizer, teacher):
    """All tensors, whole, by name."""
    groups = {"model": optimizer.masters, "optimizer": optimizer.state_dict(), "teacher": teacher}
    return {f"{g}/{k}": sharding.full(v.detach()).clone() for g, group in groups.items() for k, v in group.items()}


def stage(before, after, out):
    """Goes on from the checkpoint in `before`, or begins, and saves in `after`; what it holds goes into OUT-RANK."""
    torch.set_num_threads(1)
    with distributed.launched() as rank:
        policy = Policy(UNTIED)
        with sharding.sharded(policy, "fsdp") as spread:
            optimizer = MasterAdamW(spread.model, config())
            teacher = {}
            if before.exists():
                teacher = {name: torch.zeros_like(m, requires_grad=False) for name, m in optimizer.masters.items()}
                step, stats = checkpoint.load(checkpoint.latest(before), optimizer, JOB, {"teacher": teacher})
                assert (step, stats) == (2, {"steps": 2})
            else:
                made(2, optimizer, teacher)
            save_file(everything(optimizer, teacher), f"{out}-{rank}.safetensors")
            for step in range(3) if after.name == "4" else [2]:
                rows = {"pending": [{"step": step}]}
                path = checkpoint.save(after, step, optimizer, {"steps": step}, JOB, {"teacher": teacher}, rows)
                assert checkpoint.load_rows(path, "pending") == [{"step": step}]
        if after.name == "4":
            refuses(policy, rank, after.parent / "full")
        save_file({n: p.detach() for n, p in policy.model.named_parameters()}, f"{out}-policy-{rank}.safetensors")


def refuses(policy, rank, folder):
    """Rank 1 may write no file of more than 1,000 bytes: all ranks say so, and what is there stays."""
    with sharding.sharded(policy, "fsdp") as spread:
        optimizer = MasterAdamW(spread.model, config())
        checkpoint.save(folder, 1, optimizer, {}, JOB)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            with pytest.raises(
                files.WriteError, match=r"checkpoint-2 cannot be written: File too large; raise the limit"
            ):
                checkpoint.save(folder, 2, optimizer, {}, JOB)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        distributed.meet("the test")
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Four ranks begin; two go on, one, and four again; what each held is in FOLDER/STAGE-RANK.safetensors."""
    folder = tmp_path_factory.mktemp("stages")
    torchrun.run(4, __file__, folder / "none", folder / "4", folder / "first")
    torchrun.run(2, __file__, folder / "4", folder / "2", folder / "second")
    stage(folder / "2", folder / "1", folder / "third")
    torchrun.run(4, __file__, folder / "1", folder / "last", folder / "fourth")
    return folder


def test_any_number_of_ranks_goes_on_with_the_same_bits(out):
    expected = load_file(out / "first-0.safetensors")
    optimizer, teacher = MasterAdamW(Policy(UNTIED).model, config()), {}
    made(2, optimizer, teacher)
    alone = everything(optimizer, teacher)
    assert expected.keys() == alone.keys()
    assert len({name.split("/")[0] for name in expected}) == 3
    close({name: expected[name] for name in alone}, alone, 1e-6)  # AdamW's own loops round shards otherwise
    for name, ranks in (("first", 4), ("second", 2), ("third", 1), ("fourth", 4)):
        for rank in range(ranks):
            held = load_file(out / f"{name}-{rank}.safetensors")
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[key], expected[key]) for key in expected), name
            policy = load_file(out / f"{name}-policy-{rank}.safetensors")
            assert all(torch.equal(policy[key], expected[f"model/{key}"]) for key in policy)


def test_each_rank_writes_its_part_and_all_of_it_is_in_the_manifest(out):
    assert [path.name for path in checkpoint.found(out / "4")] == ["checkpoint-2", "checkpoint-1"]  # the last two
    path = checkpoint.latest(out / "4")
    entries = json.loads((path / files.MANIFEST).read_text())["files"]
    parts = [path / f"shards/__{rank}_0.distcp" for rank in range(4)]
    assert {"state.json", "pending.jsonl", "shards/.metadata"} < entries.keys()
    assert all(entries[f"shards/{part.name}"]["sha256"] == files.digest(part) for part in parts)
    written = elements(FileSystemReader(path / checkpoint.SHARDS).read_metadata())
    total = sum(p.numel() for p in Policy(UNTIED).model.parameters()) * 4  # weights, two moments, the teacher
    assert written.keys() == {part.name for part in parts}
    assert sum(written.values()) - total < 100  # counts of steps
    assert max(written.values()) <= total / 4 * 1.15


def elements(metadata):
    """How many elements lie in each file."""
    written = Counter()
    for index, info in metadata.storage_data.items():
        chunks = metadata.state_dict_metadata[index.fqn].chunks
        written[info.relative_path] += next(c.sizes.numel() for c in chunks if c.offsets == index.offset)
    return written


def test_a_damaged_part_is_noticed_and_the_checkpoint_before_is_taken(out):
    part, said = out / "4" / "checkpoint-2" / "shards" / "__3_0.distcp", []
    before = part.read_bytes()
    part.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
    try:
        assert checkpoint.latest(out / "4", said.append).name == "checkpoint-1"
        assert "the checksum of shards/__3_0.distcp differs" in said[0]
    finally:
        part.write_bytes(before)


def test_shards_of_another_model_are_refused(out):
    policy = Policy()  # tied
    with pytest.raises(checkpoint.CheckpointError, match=r"of another model: .* such as"):
        checkpoint.load(out / "4" / "checkpoint-2", MasterAdamW(policy.model, config()), JOB)
    with pytest.raises(checkpoint.CheckpointError, match=r"another training: seed was 7 and is 8"):
        checkpoint.load(out / "4" / "checkpoint-2", MasterAdamW(policy.model, config()), {"seed": 8})


if __name__ == "__main__":
    stage(*map(Path, sys.argv[1:]))
