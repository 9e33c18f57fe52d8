"""Which rank runs which rollouts, and in what micro-batches.

All ranks' rollouts are dealt out anew, so that no rank waits long for another: under FSDP2 they go
through the layers together, and every rank must run as many micro-batches as the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oprd.data.rollout import Rollout
from oprd.models.decoder import Decoder

Plan = list[list[list[Rollout]]]
"""By rank, its micro-batches. All ranks have the same number; a batch may be empty, and `collate`
makes something of it that can be run."""


def attention_share(decoder: Decoder) -> float:
    """By what part of itself a token's work grows with each token of its sequence.

    A layer of P parameters does 2 P FLOPs for a token, and attention, causal and a wide, 2 a for
    each token of the sequence on average: the share is a / P. It does not know of sliding windows
    or of experts that are not chosen.
    """
    config = decoder.backbone.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return width * decoder.num_layers / sum(p.numel() for p in decoder.layers.parameters())


@dataclass
class _Bin:
    """A micro-batch in the making; its rollouts come longest first."""

    rollouts: list[Rollout]
    tokens: int
    work: int

    @classmethod
    def of(cls, rollouts: list[Rollout], packed: bool, share: float) -> _Bin:
        lengths = [r.longest for r in rollouts]
        if not packed:  # each as long as the longest
            lengths = [max(lengths, default=0)] * len(lengths)
        return cls(rollouts, sum(lengths), sum(round(n * (1 + share * n)) for n in lengths))

    def add(self, rollout: Rollout, one: _Bin) -> None:
        self.rollouts.append(rollout)
        self.tokens += one.tokens
        self.work += one.work


def batch_work(batch: Sequence[Rollout], packed: bool, share: float = 0.0) -> int:
    """What a micro-batch costs, in tokens at the beginning of a sequence, padding included.

    Args:
        share: see `attention_share`.
    """
    return _Bin.of(list(batch), packed, share).work


def plan(
    rollouts: Sequence[Rollout],
    ranks: int,
    max_tokens: int,
    packed: bool = False,
    share: float = 0.0,
) -> Plan:
    """Deal rollouts out to ranks and micro-batches.

    There are as few micro-batches as will hold everything, times a whole number for each rank, and
    then the largest of them is made as small as possible: a search over the size that is allowed,
    each tried by first-fit decreasing (MULTIFIT; Coffman, Garey and Johnson, 1978). Without packing
    only rollouts that are next to each other by length share a batch. The i-th micro-batches of the
    ranks, which run at the same time, are of like size.

    The result depends on the arguments alone: every rank that calls it with the same ones finds the
    same plan.

    Args:
        rollouts: of all ranks (`oprd.distributed.gather`), for one teacher.
        max_tokens: of a micro-batch, padding included; by the longer of the two models' inputs. A
            longer single rollout is a batch of its own.
        packed: batches will be packed, not padded.
        share: how a token's work grows with its sequence (`attention_share`); 0: not at all.
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
    planned: Plan = [[] for _ in range(ranks)]
    load = [0] * ranks
    for start in range(0, most, ranks):
        together = bins[start : start + ranks]
        together += [_Bin([], 0, 0)] * (ranks - len(together))
        least_first = sorted(range(ranks), key=lambda rank: load[rank])
        for rank, one in zip(least_first, together, strict=True):
            planned[rank].append(one.rollouts)
            load[rank] += one.work
    return planned


def micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, packed: bool = False
) -> list[list[Rollout]]:
    """One rank's plan for rollouts of its own."""
    return plan(rollouts, 1, max_tokens, packed)[0]


def _fill(
    ordered: Sequence[Rollout], max_tokens: int, budget: int | None, packed: bool, share: float
) -> list[_Bin]:
    """Bins of at most ``max_tokens`` tokens and ``budget`` work (None: any), but for single
    rollouts. Padded, the first of a bin sets what every other costs."""
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
    """Halve the largest bins until there are ``most``, or one for each rollout: no rank should be
    idle while another has two rollouts."""
    while len(bins) < most:
        shared = [b for b in bins if len(b.rollouts) > 1]
        if not shared:
            return
        largest = max(shared, key=lambda b: b.work)
        bins.remove(largest)
        # Packed: every other one, as both halves should cost the same; padded: like lengths.
        half = (len(largest.rollouts) + 1) // 2
        order = largest.rollouts
        parts = (order[::2], order[1::2]) if packed else (order[:half], order[half:])
        bins += [_Bin.of(part, packed, share) for part in parts]
