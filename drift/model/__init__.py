"""The policy: a causal language model, its chat template and its attention over packs."""
