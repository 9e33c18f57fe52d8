"""How rollouts are dealt out to ranks and micro-batches."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.config import OBJECTIVES, DistillConfig, OpdConfig
from oprd.data.collate import collate
from oprd.data.micro_batches import assign, attention_share, batch_work, micro_batches
from oprd.data.rollout import Rollout
from oprd.distill.distiller import attach
from oprd.distill.objectives import REP, Objectives
from oprd.models.decoder import find_decoder
from oprd.tokenizers.alignment import Reading
from oprd.training.metrics import plan_metrics, rep_metrics
from tests.oprd.distill.test_attach_with_bridge import make_bridge
from tests.support.tiny import make_model


def rollout(length):
    return Rollout([1] * (length - 1), [2], False)


def rollouts_of(lengths):
    return [rollout(n) for n in lengths]


def tokens(batch, packed):
    """That go through a model."""
    found = [r.longest for r in batch]
    return sum(found) if packed else max(found, default=0) * len(found)


some_lengths = st.lists(st.integers(1, 60), max_size=40)
some_plan = {
    "ranks": st.integers(1, 5),
    "max_tokens": st.integers(20, 200),
    "packed": st.booleans(),
    "share": st.sampled_from([0.0, 0.01, 1.0]),
}


@given(lengths=some_lengths, **some_plan)
@settings(deadline=None)
def test_every_rollout_once_within_the_limit_and_as_many_batches_on_every_rank(
    lengths, ranks, max_tokens, packed, share
):
    rollouts = rollouts_of(lengths)
    planned = assign(rollouts, ranks, max_tokens, packed, share)
    assert len(planned) == ranks
    assert sorted(map(id, rollouts)) == sorted(id(r) for rank in planned for b in rank for r in b)
    assert len({len(rank) for rank in planned}) == 1
    batches = [batch for rank in planned for batch in rank]
    for batch in batches:
        assert tokens(batch, packed) <= max_tokens or len(batch) == 1
    if not all(batches):  # a batch is empty only where no other holds two rollouts
        assert all(len(batch) <= 1 for batch in batches)
    assert assign(rollouts, ranks, max_tokens, packed, share) == planned


def fewest_by_length(lengths, limit):
    """Padded batches of rollouts next to each other by length, by dynamic programming."""
    ordered = sorted(lengths)

    @cache
    def fewest(n):
        """For the n shortest."""
        ends = [i for i in range(n) if ordered[n - 1] * (n - i) <= limit or n - i == 1]
        return 1 + min(map(fewest, ends)) if n else 0

    return fewest(len(ordered))


@given(lengths=some_lengths, **some_plan)
@settings(deadline=None)
def test_no_more_batches_than_need_be(lengths, ranks, max_tokens, packed, share):
    rounds = len(assign(rollouts_of(lengths), ranks, max_tokens, packed, share)[0])
    if not packed:
        assert rounds == -(-fewest_by_length(lengths, max_tokens) // ranks)
        return
    fitting = [n for n in lengths if n <= max_tokens]
    # First-fit leaves no two bins half empty.
    most = -(-2 * sum(fitting) // max_tokens) + len(lengths) - len(fitting)
    assert -(-sum(fitting) // max_tokens) <= rounds * ranks
    assert rounds <= -(-most // ranks)


@given(st.lists(st.integers(1, 60), min_size=20, max_size=60), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_batches_are_alike_in_size(lengths, ranks, packed):
    planned = assign(rollouts_of(lengths), ranks, 300, packed)
    works = [[batch_work(batch, packed) for batch in rank] for rank in planned]
    largest, number = max(map(max, works)), sum(map(len, works))
    slack = 1 + largest / 64  # the search stops there
    if packed:  # whatever first-fit can't hold: every bin is full but for less than a rollout
        assert largest - slack <= sum(lengths) / number + max(lengths)
    else:  # none of the splits by length has a smaller largest batch
        smaller = int(largest - slack) - 1
        assert smaller < max(lengths) or fewest_by_length(lengths, smaller) > number
    totals = [sum(work) for work in works]
    by_round = [max(together) - min(together) for together in zip(*works, strict=True)]
    assert max(totals) - min(totals) <= max(by_round)  # differences do not add up


def test_planned_ranks_wait_less_than_ranks_with_their_own_rollouts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 2000, (64,), generator=generator).tolist()
    rollouts, share = rollouts_of(lengths), 1e-4
    own = [micro_batches(rollouts[rank::4], 4096) for rank in range(4)]
    most = max(map(len, own))
    naive = [batches + [[]] * (most - len(batches)) for batches in own]
    waiting = {}
    for name, planned, packed in [
        ("naive", naive, False),
        ("padded", assign(rollouts, 4, 4096, False, share), False),
        ("packed", assign(rollouts, 4, 4096, True, share), True),
    ]:
        waiting[name] = plan_metrics([planned], packed, share)
    beyond = {name: metrics["perf/rank_imbalance"] - 1 for name, metrics in waiting.items()}
    assert beyond["padded"] < beyond["naive"] / 2
    assert beyond["packed"] < beyond["naive"] / 4
    assert waiting["packed"]["perf/padding_ratio"] == 0
    assert waiting["padded"]["perf/padding_ratio"] > 0


def test_the_metrics_of_a_plan():
    planned = [[rollouts_of([6, 2])], [rollouts_of([4])]]
    found = plan_metrics([planned], False, 0.0)
    assert found["perf/padding_ratio"] == pytest.approx(4 / 16)
    assert found["perf/rank_imbalance"] == pytest.approx(12 / 8)
    found = plan_metrics([planned], True, 0.5)  # 6 * (1 + 3) + 2 * (1 + 1) and 4 * (1 + 2)
    assert found["perf/padding_ratio"] == 0
    assert found["perf/rank_imbalance"] == pytest.approx(28 / 20)


def test_the_longer_of_both_inputs_counts():
    reads_more = [Rollout([1], [2], False, reading=Reading([3] * 9, [2])) for _ in range(4)]
    assert [len(batch) for batch in micro_batches(reads_more, 20)] == [2, 2]
    assert [len(batch) for batch in micro_batches(reads_more, 20, packed=True)] == [2, 2]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_attention_share(architecture):
    """From what the layers' matrices and heads do, one by one."""
    model = make_model(architecture)
    layer = find_decoder(model).layers[0]
    matrices = sum(p.numel() for p in layer.parameters())
    width = 4 * {"qwen3": 16}.get(architecture, 8)
    assert attention_share(find_decoder(model)) == pytest.approx(width / matrices, rel=1e-6)


# A rank that is short of work ---------------------------------------------------------------------

TEXT = Rollout([3, 4], [5, 6, 2], False, reading=Reading([7], [8, 1], [(1, 0), (2, 1)]))
SAME = Rollout([3, 4], [5, 6, 2], False)


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_batch_can_be_run(packed):
    batch = collate([], 9, "cpu", packed=packed)
    assert batch.input_ids.tolist() == [[9]]
    assert not batch.response_mask.any()
    assert batch.reading is None
    if packed:
        assert (batch.attention_mask, batch.position_ids.tolist()) == (None, [[0]])
    else:
        assert (batch.attention_mask.tolist(), batch.position_ids) == ([[1]], None)
    # The student's padding id may lie beyond the other vocabulary.
    assert collate([], 9, "cpu", 4, packed=packed).for_teacher.input_ids.tolist() == [[4]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("weights", "implementation", "kind"),
    [
        *(({n: 1.0}, how, "same") for n in OBJECTIVES for how in ("chunked", "materialised")),
        ({REP: 1.0}, "chunked", "bridge"),
        ({REP: 1.0}, "chunked", "tokenizer"),
        ({REP: 1.0, "opd_full": 1.0}, "chunked", "bridge"),
    ],
    ids=str,
)
def test_an_empty_batch_adds_nothing(weights, implementation, kind, packed):
    """Beside a full one: to losses, gradients and statistics, and all parameters are reached."""
    one = TEXT if kind == "tokenizer" else SAME
    teacher_pad = 1 if kind == "tokenizer" else None
    d = DistillConfig(positions="all", reduction="seq-mean")
    found = []
    for parts in ([[one]], [[], [one]]):
        student = make_model("qwen2", 0)
        teacher = make_model("qwen2", 1, hidden_size=32 if kind == "same" else 48)
        distillers = {}
        if REP in weights:
            bridge = None if kind == "same" else make_bridge(student, teacher)
            distillers[""] = attach(
                student, teacher, positions="all", reduction="seq-mean", bridge=bridge
            )
        opd = OpdConfig(implementation=implementation, k=4)
        objectives = Objectives(weights, student, {"": teacher}, distillers, d, opd)
        losses, reps = dict.fromkeys(weights, 0.0), []
        for part in parts:
            batch = collate(part, 0, "cpu", teacher_pad, packed)
            chosen = objectives.supervise(batch)
            states = objectives.teacher_pass(batch, chosen, "")
            out = objectives.student_pass(batch, chosen, states, dict.fromkeys(weights, 1.0))
            out.loss.backward()
            losses = {name: losses[name] + loss.item() for name, loss in out.parts.items()}
            if out.rep is not None:
                reps.append(out.rep)
            if not part:  # FSDP2 waits for every parameter of the backbone
                reached = list(find_decoder(student).backbone.parameters())
                assert all(p.grad is not None and not p.grad.any() for p in reached)
        statistics = rep_metrics(reps, [], 32, torch.device("cpu")) if reps else {}
        gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        found.append((losses, statistics, gradients))
    assert found[0][:2] == found[1][:2]
    for name, gradient in found[0][2].items():
        assert torch.equal(found[1][2][name], gradient), name
