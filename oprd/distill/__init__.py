"""What a run minimises: taps on hidden states, and losses on logits."""
