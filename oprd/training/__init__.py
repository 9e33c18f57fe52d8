"""The training loop: checks, models, steps, evaluation, stages, export."""
