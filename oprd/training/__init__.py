"""The training loop: checks before a run, model setup, steps, evaluation, stages and export."""
