"""Teachers that run ahead, and what an update waits for."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from oprd.config.demo import demo_config
from oprd.data.rollout import Rollout
from oprd.errors import ConfigError
from oprd.tokenizers.alignment import Reading
from oprd.training import overlap
from oprd.training.batches import global_batch
from oprd.training.overlap import check_overlap, in_order
from oprd.training.preflight import preflight
from oprd.training.trainer import Trainer, train
from tests.support.host_waits import host_waits
from tests.support.runs import measured, set_options, small_run

BOTH = {"oprd": 1.0, "opd_top1": 1.0}
FEW = {"eval__sets": {}, "eval__teacher": False, "micro_batch_tokens": 30}


@pytest.mark.parametrize(
    "options",
    [
        {"objectives": BOTH},
        pytest.param(
            {"student__gradient_checkpointing": True, "packing": True, "autocast": "bfloat16"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_running_ahead_changes_no_bit(tmp_path, options):
    for name, ahead in (("off", False), ("on", True)):
        train(small_run(tmp_path / name, overlap=ahead, steps=2, **FEW, **options))
    off, on = (load_file(tmp_path / n / "student" / "model.safetensors") for n in ("off", "on"))
    assert all(torch.equal(off[name], on[name]) for name in off)
    assert measured(tmp_path / "off") == measured(tmp_path / "on")
    assert len(measured(tmp_path / "on")) == 2


def test_the_order_of_passes():
    log = []

    def run(part):
        log.append(f"teacher {part}")
        return part

    def order(free):
        log.clear()
        passes = in_order("abc", run, free.__contains__)
        for part in "abc":
            assert next(passes)() == part
            log.append(f"student {part}")
        assert list(passes) == []
        return " ".join(x.replace("teacher ", "t").replace("student ", "s") for x in log)

    assert order("") == "ta sa tb sb tc sc"
    assert order("abc") == "ta tb sa tc sb sc"
    assert order("ac") == "ta sa tc tb sb sc"  # b shares its weights: never beside a student
    assert list(in_order("", run, lambda _: True)) == []


class Stream:
    """A stream that knows which work is over before its next begins."""

    def __init__(self):
        self.before = set()

    def wait_stream(self, other):
        self.before |= other.before

    wait_event = wait_stream

    def record_event(self):
        event = Stream()
        event.before = set(self.before)
        return event


@pytest.fixture
def streams(monkeypatch):
    """The main stream and another one, in place of a GPU's."""
    main, side = Stream(), Stream()
    side.device = None
    now = [main]

    @contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    return main, side, now


def test_what_waits_for_what_on_two_streams(streams):
    main, side, now = streams
    began = {}

    def work(name):
        began[name] = set(now[-1].before)
        now[-1].before.add(name)
        return name

    passes = in_order(range(4), lambda i: work(f"t{i}"), lambda _: True, side)
    work("batches")
    for i in range(4):
        next(passes)()
        work(f"s{i}")
    passes.close()
    for i in range(4):
        assert {"batches", f"t{i}"} <= began[f"s{i}"]
        assert "batches" in began[f"t{i}"]
        if i < 3:  # they may run at once
            assert f"t{i + 1}" not in began[f"s{i}"]
            assert f"s{i}" not in began[f"t{i + 1}"]
        if i > 1:  # what it allocates may be the memory of the pass before last
            assert f"s{i - 2}" in began[f"t{i}"]
    # After an error nothing is left running.
    passes = in_order(range(2), lambda i: work(f"u{i}"), lambda _: True, side)
    next(passes)()
    assert "u1" not in main.before
    passes.close()
    assert "u1" in main.before


def test_what_cannot_run_ahead_is_refused():
    def checked(ranks=1, **options):
        return check_overlap(set_options(demo_config(), {"overlap": True} | options), ranks)

    assert "two teacher passes" in checked()[0]
    assert check_overlap(demo_config(), 2) == []
    assert checked(ranks=2, fsdp__teacher="replicated")
    with pytest.raises(ConfigError, match="teacher is the student itself"):
        checked(teacher__path="self:current")
    with pytest.raises(ConfigError, match=r"fsdp\.teacher=replicated"):
        checked(ranks=2)
    cfg = replace(demo_config(), overlap=True)
    cfg.teacher.path = "self:current"
    with pytest.raises(ConfigError, match="teacher is the student itself"):
        preflight(cfg, dry_run=True)


def test_a_stream_is_made_for_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    gpu, ahead = torch.device("cuda", 0), replace(demo_config(), overlap=True)
    assert overlap.side_stream(ahead, gpu) == "a stream of cuda:0"
    assert overlap.side_stream(ahead, torch.device("cpu")) is None
    assert overlap.side_stream(demo_config(), gpu) is None


# What the host waits for ------------------------------------------------------------------------

ROLLOUTS = [
    Rollout(list(range(5, 5 + n)), list(range(5, 5 + n)), False, reading=reading)
    for n, reading in [(3, None), (5, Reading([5, 6, 7], [5, 6, 7, 8, 9])), (4, None), (2, None)]
]


def loaded(directory, **changes):
    cfg = small_run(directory, **FEW | {"micro_batch_tokens": 16} | changes)
    trainer = Trainer(cfg, preflight(cfg))
    trainer._load()
    # AdamW counts its steps on the CPU, and reads them there.
    trainer.update.optimizer = torch.optim.SGD(trainer.student.parameters(), lr=0.02)
    trainer.update.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.update.optimizer, 1.0)
    return trainer


def batch_of(trainer, device):
    update = trainer.update
    return global_batch(ROLLOUTS, update.objectives, trainer.cfg, update.pad, {}, device)


@pytest.mark.parametrize(
    ("objectives", "packing"),
    [({"oprd": 1.0, "opd_topk": 1.0, "opd_full": 1.0}, False), (BOTH, True)],
)
def test_passes_wait_for_nothing_but_the_check_of_a_mask(tmp_path, objectives, packing):
    trainer = loaded(tmp_path / "run", objectives=objectives, packing=packing, opd__k=4)
    work = batch_of(trainer, trainer.device)
    assert len(work.micro_batches) > 1
    with host_waits() as found:
        trainer.update._backward(work, 0)
    trainer.closing.close()
    # In every forward pass transformers looks whether anything is padded, or packed.
    own = [place for place in found if "masking_utils.py" not in place]
    assert own == []
    assert 0 < len(found) <= 2 * 2 * len(work.micro_batches)


def test_tokens_are_selected_before_they_are_on_the_device(tmp_path):
    # Meta tensors have no values: what depended on them would fail.
    trainer = loaded(
        tmp_path / "run", objectives=BOTH, distill__shift="before", distill__reduction="seq-mean",
        distill__positions="last_k",
    )  # fmt: skip
    there, here = (batch_of(trainer, torch.device(d)) for d in ("meta", "cpu"))
    trainer.closing.close()
    assert there.totals == here.totals
    one, other = there.micro_batches[0], here.micro_batches[0]
    assert one.batch.input_ids.is_meta
    assert one.batch.for_teacher.input_ids.is_meta
    assert one.chosen.opd.rows.is_meta
    assert one.chosen.rep.weights.shape == other.chosen.rep.weights.shape


def test_the_end_of_a_step_waits_a_few_times_however_many_batches(tmp_path):
    trainer, found = loaded(tmp_path / "run"), {}
    for tokens in (16, 40):
        trainer.cfg.micro_batch_tokens = tokens
        batches = len(batch_of(trainer, trainer.device).micro_batches)
        with host_waits() as waits:
            trainer.update(ROLLOUTS, 1)
        found[batches] = [w for w in waits if "masking_utils" not in w and not _on_cpu(w)]
    trainer.closing.close()
    few, many = (found[batches] for batches in sorted(found))
    assert few == many
    # The norm, the losses and the layers' losses, the weights, the metrics.
    assert len(few) == 5, few


def _on_cpu(place):
    """Whether it is part of the making of batches, which is on the CPU always."""
    return any(f"in {file}" in place for file in ("supervision.py", "collate.py", "batches.py"))
