"""Conversations with a policy: sampling, environments, tools."""
