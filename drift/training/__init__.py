"""Optimizer steps over packed batches, checkpoints, ranks, and log-probs of a reference."""
