"""From prompts to batches of rollouts: what the models read, and which tokens are supervised."""
