"""Verdicts on model text: rules for answers in this process, and everything that parses further in a sandbox.

Nothing here imports torch or the rest of the trainer, so that a worker process starts fast and holds little.
"""
