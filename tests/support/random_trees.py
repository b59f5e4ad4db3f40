"""Random groups of trajectories that share prefixes in every way, and what a tree of them should be, word by word."""

import torch
from hypothesis import strategies as st

from drift.types import Trajectory, Turn

FREE = 3  # ids below it are special in the tiny models


@st.composite
def groups(draw, vocabulary=7, most=12, depth=6, rich=False):
    """Trajectories that branch up to `depth` times: copies, prefixes of each other, and ones that differ in a last token."""
    token = st.integers(FREE, vocabulary - 1)
    made = []
    for _ in range(draw(st.integers(1, most))):
        if made and draw(st.booleans()):
            parent = draw(st.sampled_from(made))
            branch = parent[: draw(st.integers(0, len(parent)))]
        else:
            branch = []
        for _ in range(draw(st.integers(0, depth))):
            branch = branch + draw(st.lists(token, min_size=0, max_size=4))
        if draw(st.integers(0, 5)) == 0 and made:  # one token apart
            branch = [*draw(st.sampled_from(made))[:-1], draw(token)]
        made.append(branch if len(branch) > 1 else [*branch, draw(token), draw(token)])
    return [trajectory(draw, index, ids, rich) for index, ids in enumerate(made)]


def trajectory(draw, index, ids, rich):
    """One with turns anywhere behind its first token, a weight, and with `rich` an advantage and a sampler's log-probs."""
    edges = sorted(draw(st.sets(st.integers(1, len(ids)), min_size=2, max_size=6)) | {len(ids)})
    if len(edges) < 2:
        edges = [1, len(ids)]
    spans = [Turn(a, b) for a, b in zip(edges[::2], edges[1::2])]
    weight = draw(st.sampled_from([0.25, 1.0, 2.5]))
    more = {}
    if rich:
        inside = {i for turn in spans for i in range(turn.start, turn.stop)}
        numbers = torch.Generator().manual_seed(index)
        drawn = (-3 * torch.rand(len(ids), generator=numbers)).tolist()
        more["logprobs"] = [value if i in inside else 0.0 for i, value in enumerate(drawn)]
        more["advantage"] = draw(st.sampled_from([-1.5, -0.5, 0.5, 2.0]))
    return Trajectory(f"p{index // 4}", ids, spans, weight=weight, index=index, **more)


def paths(batch):
    """Of each row the rows from its root to itself, by following parents."""
    starts = batch.starts.tolist()
    stops = [*starts[1:], len(batch.input_ids)]
    found = []
    for start, stop, parent in zip(starts, stops, batch.parents.tolist()):
        above = [] if parent < 0 else found[stops[parent] - 1]
        for row in range(start, stop):
            found.append([*above, *range(start, row + 1)])
    return found
