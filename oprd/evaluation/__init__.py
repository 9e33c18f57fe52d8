"""Evaluation of models: sampling, grading and statistics (``oprd-eval``, and within a run)."""
