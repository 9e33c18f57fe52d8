"""Prompts, rollouts and batches: what the models read, and which tokens are supervised."""
