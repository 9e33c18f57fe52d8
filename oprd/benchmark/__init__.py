"""Benchmarks: cost of the update by objective (gains), and training with each (compare)."""
