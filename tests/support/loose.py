"""The ops with a head's fields among the other keywords, for tests that draw both from one table.

`loose.policy_loss(h, w, …, softcap=4.0)` is `dk.policy_loss(h, dk.Head(w, softcap=4.0), …)`.
"""

from dataclasses import replace

import drift_kernels as dk

HEAD = ("bias", "lora", "softcap", "logit_scale", "temperature", "parallel")
EXPLORATION = {"turn_ids": "turn_ids", "rebellious_weights": "weights", "mean_difference": "mean_difference"}
EXPLORATION |= {"mean_entropy": "mean_entropy"}


def head_of(head, options):
    """The head with the fields that are in `options`, which lose them."""
    fields = {name: options.pop(name) for name in HEAD if name in options}
    if not fields:
        return head
    return replace(head, **fields) if isinstance(head, dk.Head) else dk.Head(head, **fields)


def _loose(op):
    def call(hidden, head, *args, **options):
        head = head_of(head, options)
        parts = {name: options.pop(old) for old, name in EXPLORATION.items() if old in options}
        if isinstance(options.get("exploration"), dk.ExplorationSpec):
            options["exploration"] = dk.Exploration(options["exploration"], **parts)
        return op(hidden, head, *args, **options)

    return call


def Teacher(hidden, head, **fields):
    """`dk.Teacher` with the fields of its head."""
    return dk.Teacher(hidden, head_of(head, fields))


linear_logprob = _loose(dk.linear_logprob)
weighted_cross_entropy = _loose(dk.weighted_cross_entropy)
policy_loss = _loose(dk.policy_loss)
pointwise_loss = _loose(dk.pointwise_loss)
distill_loss = _loose(dk.distill_loss)
self_distill_loss = _loose(dk.self_distill_loss)
topk_logprobs = _loose(dk.topk_logprobs)
