"""Metrics of the rollouts."""

import torch

from oprd.data.rollout import Rollout, rollout_metrics


def test_lengths_and_shares_of_cut_and_empty_responses():
    rollouts = [
        Rollout([1, 2], [9], truncated=False),  # ends at once
        Rollout([1, 2], [5], truncated=True),  # was allowed one token
        Rollout([1], [5, 6, 7, 9], truncated=False),
        Rollout([1], [5, 6, 7, 8], truncated=True),
    ]
    metrics = rollout_metrics(rollouts, torch.device("cpu"), aligned=False)
    assert metrics == {
        "response_length/mean": 2.5,
        "response_length/max": 4.0,
        "response_length/clip_ratio": 0.5,
        "response_length/empty_ratio": 0.25,
        "rollout/tokens": 16,
    }
