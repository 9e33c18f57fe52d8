"""The training objectives: taps that compare hidden states, and losses on logits."""
