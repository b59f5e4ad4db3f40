"""Heads spread over 1, 2 and 4 ranks against one process that holds them whole: losses, outputs, metrics, gradients, bytes.

One set of processes for each number of ranks runs everything and writes it down; the tests compare.
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import op_cases
import pytest
import torch
import torch.distributed as dist
import torchrun
from op_cases import Op, data_of, head_of

import drift_kernels as dk
from drift_kernels import collectives
from drift_kernels.shares import ShareKernels

V, D, K = op_cases.V, op_cases.D, op_cases.K
EDGES = {1: [0, V], 2: [0, 9, V], 4: [0, 1, 8, 9, V]}  # where shares begin: odd sizes, some smaller than K
SEQUENCES = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2], [3, 4]], 4: [[0], [1, 2], [], [3, 4]]}  # of each rank; one has none
LENGTHS, SEED = [5, 7, 1, 3, 9], 11
CHUNKED = dk.KernelConfig(workspace_bytes=6 * op_cases.ROW_BYTES)
SPREAD = ("weight", "bias", "B", "teacher_weight", "teacher_bias", "teacher_B")
MODES = {"vocab": dk.VocabParallel, "gather": dk.GatherHidden}


def plain(x, config, normalizer, names):
    t, head = x.tokens, dk.Head(x.head["weight"], parallel=x.parallel)
    data = data_of(x, "old_logprobs", "token_weights")
    options = {"normalizer": normalizer, "outputs": names, "config": config}
    out = dk.policy_loss(t["hidden"], head, t["targets"], t["advantages"], **data, **options)
    unread = sum(x.leaf(name).sum() * 0 for name in ("bias", "A", "B"))
    return replace(out, loss=out.loss + unread)


def shared_rows(spec):
    """Every other token's hidden row has a second target; weights differ."""

    def run(x, config, normalizer, names):
        t = x.tokens
        copies = 1 + (t["targets"] % 2 == 0).long()
        rows = torch.repeat_interleave(torch.arange(len(copies)), copies)
        second = torch.cat((rows[:1] * 0, rows.diff())) == 0
        second[:1] = False
        targets = t["targets"][rows]
        targets = torch.where(second & (targets >= 0), (targets + 13) % V, targets)
        names_of = ("old_logprobs", "ref_logprobs", "token_weights")
        data = {name: t[name][rows] * torch.where(second, 0.7, 1.0).to(t[name]) for name in names_of}
        if spec.scope != "token":
            ends = torch.tensor(x.lengths, dtype=torch.int64)
            data["segment_ids"] = torch.repeat_interleave(torch.arange(len(ends)), ends)[rows]
        head = dk.Head(x.head["weight"], **head_of(x))
        options = {"spec": spec, "normalizer": normalizer, "outputs": names, "config": config, "rows": rows}
        return dk.policy_loss(t["hidden"], head, targets, t["advantages"][rows], **data, **options)

    return run


def rows_of_logprobs(x, config, normalizer, names):
    t = x.tokens
    rows = torch.repeat_interleave(torch.arange(len(t["targets"])), 1 + (t["targets"] % 2 == 0).long())
    head = dk.Head(x.head["weight"], **head_of(x))
    out = dk.linear_logprob(t["hidden"], head, t["targets"][rows], rows=rows, outputs=names, config=config)
    return dk.LossOutput((out.logprobs * t["token_weights"][rows]).sum() / normalizer, {"own": out.logprobs})


def active(x, config, normalizer, names):
    t, head = x.tokens, dk.Head(x.head["weight"], **head_of(x))
    index = ((t["targets"] >= 0) & (t["turn_ids"] % 2 == 0)).nonzero().squeeze(1)
    options = {"normalizer": normalizer, "outputs": names, "config": config, "active": index}
    return dk.weighted_cross_entropy(t["hidden"], head, t["targets"], t["token_weights"], **options)


CLIPPED = dk.PolicySpec(clip_low=0.05, clip_high=0.05)
EXTRA = {
    "plain": Op(plain, ("logprobs", "entropy", "clipped")),
    "rows": Op(shared_rows(op_cases.POLICY), ("logprobs", "entropy", "kl", "is_top1")),
    "rows_of_sequences": Op(shared_rows(op_cases.GSPO), ("logprobs", "ratio")),
    "rows_of_logprobs": Op(rows_of_logprobs),
    "active": Op(active, op_cases.ROWS),
    "clipped_rows": Op(op_cases.policy_loss(CLIPPED), ("ratio", "clipped")),
}
CASES = [*op_cases.OPS, *EXTRA]
FROZEN = ("linear_logprob", "policy_loss", "policy_loss_gspo", "self_distill_loss")
VARIANTS = [(name, "") for name in CASES] + [(name, "float32") for name in CASES]
VARIANTS += [(name, "frozen") for name in FROZEN]


def case(name, variant, batch):
    if variant == "float32":
        batch = batch.to(torch.float32)
    needs = ("hidden",) if variant == "frozen" else op_cases.LEAVES
    config = CHUNKED if variant != "float32" else dk.KernelConfig()
    with mock.patch.dict(op_cases.OPS, EXTRA):
        return op_cases.run(name, batch, needs=needs, outputs=True, config=config)


def spread(batch, kind, rank, ranks):
    """The batch as a rank holds it."""
    first, stop = EDGES[ranks][rank : rank + 2]
    head = {name: v[first:stop] if name in SPREAD else v for name, v in batch.head.items()}
    if kind == "gather":
        batch, _ = batch.sequences(SEQUENCES[ranks][rank])
    return replace(batch, head=head, parallel=MODES[kind](dist.group.WORLD, first, V))


class Counted:
    """Bytes that a rank receives from others."""

    def __init__(self, n):
        self.bytes, self.n = 0, n
        gather, all_to_all = dist.all_gather, dist.all_to_all_single

        def all_gather(parts, raw, group):
            self.bytes += raw.nbytes * (self.n - 1)
            return gather(parts, raw, group=group)

        def exchange(received, values, own, counts, group):
            self.bytes += received.nbytes * (self.n - 1) // self.n
            return all_to_all(received, values, own, counts, group=group)

        self.patches = (
            mock.patch.object(dist, "all_gather", all_gather),
            mock.patch.object(dist, "all_to_all_single", exchange),
        )

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


def bytes_of(kind, batch, n):
    with Counted(n) as counted, mock.patch.dict(op_cases.OPS, EXTRA):
        op_cases.run("plain", batch.to(torch.float32), needs=("hidden", "weight", "bias", "A", "B"))
    counts = (batch.tokens["targets"] >= 0) & (batch.tokens["advantages"] != 0) & (batch.tokens["token_weights"] != 0)
    return counted.bytes, int(counts.sum())


total, own_columns, reduce_rows = collectives.total, ShareKernels._own, collectives.reduce_rows


def counted_twice(self, ids):
    own, columns = own_columns(self, ids)
    return torch.ones_like(own), columns.clamp(min=0)


MUTATIONS = {
    "a target outside the share counted twice": (ShareKernels, "_own", counted_twice),
    "dhidden not reduced": (collectives, "total", lambda values, share: values),
    "dhidden reduced twice": (collectives, "total", lambda values, share: total(total(values, share), share)),
    "statistics not merged": (collectives, "gather", None),
}


def left_out(values, share, gather=collectives.gather):
    return gather(values, share) if values.dtype == torch.int64 else torch.stack([values] * dist.get_world_size())


def mutated(batch):
    found = {}
    for name, (owner, attribute, change) in MUTATIONS.items():
        with mock.patch.object(owner, attribute, change or left_out):
            found[name] = case("policy_loss", "", batch)
    return found


def refused(batch, rank, ranks):
    """What is said to callers, by what they did."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    t, weight = batch.tokens, batch.head["weight"]
    mesh = init_device_mesh("cpu", (ranks,))
    dtensor = distribute_tensor(weight, mesh, [Shard(0)])
    first, stop = EDGES[ranks][rank : rank + 2]
    head = dk.Head(weight[first:stop], parallel=dk.VocabParallel(dist.group.WORLD, first, V))
    gathered = replace(head, parallel=dk.GatherHidden(dist.group.WORLD, first, V))

    def loss(head, **options):
        return dk.weighted_cross_entropy(t["hidden"], head, t["targets"], **options)

    def policy(head, objective):
        spec = dk.PolicySpec(objective=objective)
        return dk.policy_loss(
            t["hidden"], head, t["targets"], t["advantages"], old_logprobs=t["old_logprobs"], spec=spec
        )

    def backward(scale):
        leaf = replace(gathered, weight=gathered.weight.clone().requires_grad_())
        (loss(leaf).loss * scale).backward()

    tries = {
        "dtensor": lambda: loss(dk.Head(dtensor)),
        "reference": lambda: loss(head, config=dk.KernelConfig(backend="reference")),
        "clip_cov": lambda: policy(head, "clip_cov"),
        "kl_cov": lambda: policy(gathered, "kl_cov"),
        "teacher": lambda: dk.distill_loss(t["hidden"], head, dk.Teacher(t["hidden"], weight)),
        "rows": lambda: dk.Head(weight, parallel=dk.VocabParallel(dist.group.WORLD, 1, V)),
        "group": lambda: loss(dk.Head(weight, parallel=dk.VocabParallel("nobody", 0, V))),
    }
    if ranks > 1:
        odd = replace(head, parallel=dk.VocabParallel(dist.group.WORLD, first, V + 1))
        tries["tiles"] = lambda: loss(odd)
        tries["other call"] = lambda: loss(replace(head, softcap=1.0 + rank))
        tries["other rows"] = lambda: loss(head, active=torch.arange(3 + rank))
        tries["other values"] = lambda: loss(head, token_weights=torch.full(t["targets"].shape, 1.0 + rank))
        tries["scale"] = lambda: backward(1.0 + rank)
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def of_dtensor(batch, rank, ranks):
    """dweight of a DTensor's shard, as FSDP would hold it, whole."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (ranks,))
    weight = distribute_tensor(batch.head["weight"], mesh, [Shard(0)]).requires_grad_()
    own, _ = batch.sequences(SEQUENCES[ranks][rank])
    head = dk.Head(weight.to_local(), parallel=dk.GatherHidden.of(weight))
    dk.weighted_cross_entropy(own.tokens["hidden"], head, own.tokens["targets"], normalizer=3.0).loss.backward()
    return weight.grad.full_tensor()


def compiled(batch):
    """Loss and dhidden of a compiled step."""
    hidden = batch.tokens["hidden"].clone().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden, weight, targets):
        return dk.weighted_cross_entropy(hidden, dk.Head(weight, parallel=batch.parallel), targets).loss * 2

    loss = step(hidden, batch.head["weight"], batch.tokens["targets"])
    loss.backward()
    return loss.detach(), hidden.grad


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batch, found = op_cases.make(LENGTHS, SEED), {}
    for kind in MODES:
        held = spread(batch, kind, rank, ranks)
        for name, variant in VARIANTS:
            found[kind, name, variant] = case(name, variant, held)
        found[kind, "again"] = case("self_distill_loss", "float32", held)
        found[kind, "bytes"] = bytes_of(kind, held, ranks)
    found["mutated"] = mutated(spread(batch, "vocab", rank, ranks))
    found["refused"] = refused(batch, rank, ranks)
    found["dtensor"] = of_dtensor(batch, rank, ranks)
    found["compiled"] = compiled(spread(batch, "vocab", rank, ranks))
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    """(case, variant) → its result in one process."""
    batch = op_cases.make(LENGTHS, SEED)
    return {(name, variant): case(name, variant, batch) for name, variant in VARIANTS}


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(request, tmp_path_factory):
    """What each rank wrote."""
    out = tmp_path_factory.mktemp("heads")
    torchrun.run(request.param, __file__, out)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def together(parts, kind):
    """The ranks' results as one process would have them."""
    head = {}
    for name in parts[0].head:
        values = [part.head[name] for part in parts]
        if name in SPREAD:
            head[name] = torch.cat(values)
        else:
            head[name] = values[0] if kind == "vocab" else torch.stack(values).sum(0)
    rows = parts[0] if kind == "vocab" else op_cases.joined([replace(part, head={}) for part in parts])
    return replace(rows, head=head)


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=lambda v: v or "float64")
def test_shares_of_a_head_give_what_one_process_gives(kind, name, variant, found, alone):
    parts, expected = [rank[kind, name, variant] for rank in found], alone[name, variant]
    tolerance = {"rtol": 2e-4, "atol": 2e-5} if variant == "float32" else {}
    op_cases.close(together(parts, kind), expected, **tolerance)
    if kind == "vocab":
        for part in parts[1:]:  # the same bits on all ranks
            op_cases.close(replace(part, head={}), replace(parts[0], head={}), rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODES)
def test_results_repeat_bit_for_bit(kind, found):
    for rank in found:
        op_cases.close(rank[kind, "again"], rank[kind, "self_distill_loss", "float32"], rtol=0, atol=0)


def test_bytes_through_the_collectives_are_those_of_the_formula(found):
    n = len(found)
    agreed, scale = (n - 1) * 8 * 4, (n - 1) * 8
    for rank in found:
        received, rows = rank["vocab", "bytes"]
        dhidden = 2 * (n - 1) * -(-rows * D // n) * 4
        assert received == agreed + scale + (n - 1) * 24 * rows + dhidden
    counted = [rank["gather", "bytes"][1] for rank in found]
    per_row = D * 4 + 8 + 3 * 4  # hidden; target, advantage, old log-prob, weight
    for rank, own in zip(found, counted):
        statistics, back = 24 * sum(counted), own * D * 4
        assert rank["gather", "bytes"][0] == 2 * agreed + scale + (n - 1) * (per_row * max(counted) + statistics + back)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutated_reduction_is_noticed(mutation, found, alone):
    if len(found) == 1:
        pytest.skip("nothing is reduced on one rank")
    result = together([rank["mutated"][mutation] for rank in found], "vocab")
    with pytest.raises(AssertionError):
        op_cases.close(result, alone["policy_loss", ""])


SAYS = {
    "dtensor": ("NotImplementedError", "VocabParallel", "GatherHidden", "full_tensor"),
    "reference": ("NotImplementedError", "backend='reference'"),
    "clip_cov": ("NotImplementedError", "clip_cov"),
    "kl_cov": ("NotImplementedError", "kl_cov", "VocabParallel"),
    "teacher": ("teacher.head.parallel",),
    "rows": ("ValueError", "first=1"),
    "group": ("ValueError", "group='nobody'"),
    "tiles": ("ValueError", "each once"),
    "other call": ("ValueError", "different calls"),
    "other rows": ("ValueError", "different calls"),
    "other values": ("ValueError", "different calls"),
    "scale": ("RuntimeError", "same number"),
}


@pytest.mark.parametrize("what", SAYS)
def test_calls_that_cannot_be_spread_are_refused_on_every_rank(what, found):
    for rank in found:
        said = rank["refused"]
        if what in said:
            assert all(part in said[what] for part in SAYS[what]), said[what]


def test_the_shard_of_a_dtensor_gets_its_gradient(found):
    batch = op_cases.make(LENGTHS, SEED)
    weight = batch.head["weight"].clone().requires_grad_()
    dk.weighted_cross_entropy(batch.tokens["hidden"], weight, batch.tokens["targets"], normalizer=3.0).loss.backward()
    for rank in found:
        torch.testing.assert_close(rank["dtensor"], weight.grad)


def test_a_compiled_step_holds_a_spread_head(found):
    batch = op_cases.make(LENGTHS, SEED)
    hidden = batch.tokens["hidden"].clone().requires_grad_()
    loss = dk.weighted_cross_entropy(hidden, batch.head["weight"], batch.tokens["targets"]).loss * 2
    loss.backward()
    for rank in found:
        torch.testing.assert_close(rank["compiled"], (loss.detach(), hidden.grad))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
