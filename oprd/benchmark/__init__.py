"""Measurements: what OPRD saves in the update, and objectives trained side by side."""
