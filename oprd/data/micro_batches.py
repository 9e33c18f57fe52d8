"""Assignment of rollouts to ranks and micro-batches.

The rollouts of all ranks are redistributed so that no rank waits long for another. Under FSDP2 all
ranks go through the layers together, so every rank must run the same number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oprd.data.rollout import Rollout
from oprd.models.decoder import Decoder

Assignment = list[list[list[Rollout]]]
"""Micro-batches by rank. All ranks have the same number of micro-batches. A micro-batch may be
empty: `collate` turns it into a batch of one padding token."""


def attention_share(decoder: Decoder) -> float:
    """Return the fraction by which a token's work grows with each token of its sequence.

    A layer of P parameters takes 2 P FLOPs a token. Causal attention of width a takes another 2 a
    FLOPs for each token of the sequence, on average. The share is a / P. Sliding windows and
    experts that are not chosen are not taken into account.
    """
    config = decoder.backbone.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return width * decoder.num_layers / sum(p.numel() for p in decoder.layers.parameters())


@dataclass
class _Bin:
    """A micro-batch under construction. Its rollouts are ordered longest first."""

    rollouts: list[Rollout]
    tokens: int
    work: int

    @classmethod
    def of(cls, rollouts: list[Rollout], packed: bool, share: float) -> _Bin:
        lengths = [r.longest for r in rollouts]
        if not packed:  # all are padded to the longest
            lengths = [max(lengths, default=0)] * len(lengths)
        return cls(rollouts, sum(lengths), sum(round(n * (1 + share * n)) for n in lengths))

    def add(self, rollout: Rollout, one: _Bin) -> None:
        self.rollouts.append(rollout)
        self.tokens += one.tokens
        self.work += one.work


def batch_work(batch: Sequence[Rollout], packed: bool, share: float = 0.0) -> int:
    """Return the cost of a micro-batch, padding included.

    The unit is the cost of one token at the beginning of a sequence.

    Args:
        batch: the rollouts.
        packed: True if the batch is packed, not padded.
        share: see `attention_share`.
    """
    return _Bin.of(list(batch), packed, share).work


def assign(
    rollouts: Sequence[Rollout],
    ranks: int,
    max_tokens: int,
    packed: bool = False,
    share: float = 0.0,
) -> Assignment:
    """Assign rollouts to ranks and micro-batches.

    The number of micro-batches is the smallest multiple of ``ranks`` that holds all rollouts. The
    cost of the largest micro-batch is then made as small as possible: a binary search over the
    allowed cost, where first-fit decreasing tries each candidate (MULTIFIT; Coffman, Garey and
    Johnson, 1978). Without packing, a micro-batch holds only rollouts that are adjacent in length.
    The i-th micro-batches of all ranks run at the same time, and are of similar cost.

    The result depends on the arguments alone: all ranks that pass the same arguments get the same
    assignment.

    Args:
        rollouts: rollouts of all ranks (`oprd.distributed.gather`), for one teacher.
        ranks: number of ranks.
        max_tokens: maximum tokens in a micro-batch, padding included, counted on the longer of the
            two models' inputs. A single rollout that is longer gets a micro-batch of its own.
        packed: True if batches will be packed, not padded.
        share: growth of a token's work with its sequence (`attention_share`); 0: none.

    Returns:
        The micro-batches of each rank.
    """
    ordered = sorted(rollouts, key=lambda r: r.longest, reverse=True)
    bins = _fill(ordered, max_tokens, None, packed, share)
    rounds = -(-len(bins) // ranks)
    most = rounds * ranks
    enough, too_little = max((b.work for b in bins), default=0), 0
    while enough - too_little > max(1, enough // 128):
        budget = (enough + too_little) // 2
        tried = _fill(ordered, max_tokens, budget, packed, share)
        if len(tried) <= most:
            bins, enough = tried, min(budget, max(b.work for b in tried))
        else:
            too_little = budget
    _spread(bins, most, packed, share)
    bins.sort(key=lambda b: b.work, reverse=True)
    assigned: Assignment = [[] for _ in range(ranks)]
    load = [0] * ranks
    for start in range(0, most, ranks):
        together = bins[start : start + ranks]
        together += [_Bin([], 0, 0)] * (ranks - len(together))
        least_first = sorted(range(ranks), key=lambda rank: load[rank])
        for rank, one in zip(least_first, together, strict=True):
            assigned[rank].append(one.rollouts)
            load[rank] += one.work
    return assigned


def micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, packed: bool = False
) -> list[list[Rollout]]:
    """Divide the rollouts of one rank into micro-batches, see `assign`."""
    return assign(rollouts, 1, max_tokens, packed)[0]


def _fill(
    ordered: Sequence[Rollout], max_tokens: int, budget: int | None, packed: bool, share: float
) -> list[_Bin]:
    """Fill bins of at most ``max_tokens`` tokens and ``budget`` work (None: no limit).

    A single rollout that exceeds a limit gets a bin of its own. If batches are padded, every
    rollout of a bin costs as much as its first, the longest.
    """
    bins: list[_Bin] = []
    for rollout in ordered:
        one = _Bin.of([rollout], packed, share)
        for into in bins if packed else bins[-1:]:
            first = one if packed else _Bin.of(into.rollouts[:1], packed, share)
            in_budget = budget is None or into.work + first.work <= budget
            if in_budget and into.tokens + first.tokens <= max_tokens:
                into.add(rollout, first)
                break
        else:
            bins.append(one)
    return bins


def _spread(bins: list[_Bin], most: int, packed: bool, share: float) -> None:
    """Split the largest bins in two, until there are ``most`` bins or one bin a rollout.

    Otherwise a rank could be idle while another has two rollouts.
    """
    while len(bins) < most:
        shared = [b for b in bins if len(b.rollouts) > 1]
        if not shared:
            return
        largest = max(shared, key=lambda b: b.work)
        bins.remove(largest)
        # Packed: alternate rollouts, so that both parts cost the same. Padded: keep similar
        # lengths together, which saves padding.
        half = (len(largest.rollouts) + 1) // 2
        order = largest.rollouts
        parts = (order[::2], order[1::2]) if packed else (order[:half], order[half:])
        bins += [_Bin.of(part, packed, share) for part in parts]
