"""Checkpoints as such: what is in them, whether they are whole, how they are written."""

import errno
import json
import random
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from oprd.checkpoint import files, rng, state
from oprd.checkpoint import writer as writing
from oprd.checkpoint.writer import WriteFailed, Writer
from oprd.errors import ConfigError
from tests.support.runs import assert_same, checkpoint_tensors
from tests.support.tiny import VOCAB, make_batch, make_model

CPU = torch.device("cpu")


def trained(architecture="llama", steps=2, freeze=()):
    """A model and its optimizer; the head has no gradient, so no state either."""
    model = make_model(architecture)
    for name in freeze:
        model.get_parameter(name).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, mask, _ = make_batch()
    for _ in range(steps):
        model.model(ids, mask).last_hidden_state.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors_of(model, optimizer):
    return state.model_tensors(model) | state.optimizer_tensors(model, optimizer)


def make_writer(directory, asynchronous=False, keep_last=2):
    return Writer(
        directory, CPU, asynchronous=asynchronous, keep_last=keep_last, model_files={"a": b"b"}
    )


def write(writer, tensors, *steps, best=None):
    for step in steps:
        writer.write(tensors, {"step": step, "best": best})
        writer.wait()


def names(directory):
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize("architecture", ["llama", "smollm", "gemma2"])
def test_what_is_written_is_loaded_bit_by_bit(tmp_path, architecture):
    model, optimizer = trained(architecture)
    before = {n: t.clone() for n, t in tensors_of(model, optimizer).items()}
    writer = make_writer(tmp_path)
    writer.write(
        tensors_of(model, optimizer) | {"rng/0": rng.capture(CPU)}, {"step": 2, "best": None}
    )
    path = writer.wait()
    other, other_optimizer = make_model(architecture, seed=5), None
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    assert state.load(path, other, other_optimizer, rank=0) is not None
    assert state.load(path, other, other_optimizer, rank=1) is None
    assert_same(before, tensors_of(other, other_optimizer))
    head = other.get_output_embeddings().weight
    tied = head is other.get_input_embeddings().weight
    assert (head in other_optimizer.state) == tied  # no state is made up where there was none


def test_frozen_weights_are_not_in_it(tmp_path):
    model, _ = trained(freeze=["model.embed_tokens.weight"])
    found = state.model_tensors(model)
    assert "model/model.embed_tokens.weight" not in found
    assert "model/model.norm.weight" in found


def test_another_model_is_refused(tmp_path):
    writer = make_writer(tmp_path)
    write(writer, state.model_tensors(make_model("llama")), 1)
    path = tmp_path / files.step_name(1)
    with pytest.raises(ConfigError, match="of another model"):
        state.load(path, make_model("llama", num_hidden_layers=2))
    with pytest.raises(ConfigError, match=rf"2 tensors .*there \({VOCAB}, 32\)"):
        state.load(path, make_model("llama", vocab_size=VOCAB + 1))


def test_random_states():
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.gauss(0, 1), np.random.normal()  # both keep half of a pair
    captured = rng.capture(CPU)

    def draw():
        return random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist(), random.random()

    first = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    rng.restore(captured, CPU)
    assert draw() == first


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "__0_0.distcp").write_bytes(b""), "has 0 bytes of"),
        (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
        (lambda p: (p / files.DOCUMENT).unlink(), "the checkpoint was not finished"),
        (lambda p: (p / files.DOCUMENT).write_text('{"format": 1, "st'), "can't be read"),
        (lambda p: (p / files.DOCUMENT).write_text('{"format": 99}'), "has format 99"),
        (lambda p: (p / files.DOCUMENT).write_text("[]"), "has format None"),
    ],
)
def test_a_torn_checkpoint_is_told_from_a_whole_one(tmp_path, damage, message):
    write(make_writer(tmp_path), tensors_of(*trained()), 1, 2)
    damage(tmp_path / files.step_name(2))
    good, torn = files.find(tmp_path)
    assert [c.step for c in good] == [1]
    assert message in torn[tmp_path / files.step_name(2)]


def test_a_changed_byte_is_seen_by_the_checksum(tmp_path):
    write(make_writer(tmp_path), tensors_of(*trained()), 1)
    checkpoint = files.newest(tmp_path)
    files.verify(checkpoint, checkpoint.document["files"])
    flip_a_byte(checkpoint.path / "__0_0.distcp")
    with pytest.raises(files.Torn, match=r"__0_0.distcp has changed"):
        files.verify(checkpoint, checkpoint.document["files"])


def test_the_newest_and_the_best_are_kept(tmp_path):
    writer, tensors = make_writer(tmp_path), {"model/x": torch.ones(3)}
    best = {"metric": "m", "value": 0.5, "step": 2}
    write(writer, tensors, 1)
    write(writer, tensors, 2, 3, 4, 5, best=best)
    assert names(tmp_path) == [files.BEST, *map(files.step_name, (2, 4, 5))]
    assert files.read_best(tmp_path) == best
    write(writer, tensors, 6, best={"metric": "m", "value": 0.6, "step": 6})
    assert names(tmp_path) == [files.BEST, *map(files.step_name, (5, 6))]
    shutil.rmtree(tmp_path / files.step_name(6))
    assert files.read_best(tmp_path) is None


def test_all_are_kept_if_asked(tmp_path):
    write(make_writer(tmp_path, keep_last=None), {"model/x": torch.ones(3)}, 1, 2, 3)
    assert len(names(tmp_path)) == 3


def test_an_older_one_goes_only_when_the_newer_is_complete(tmp_path, monkeypatch):
    writer = make_writer(tmp_path, keep_last=1)
    write(writer, {"model/x": torch.ones(3)}, 1)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "complete", fails)
    with pytest.raises(WriteFailed, match=r"step 2 could not be written: .*Input/output error"):
        write(writer, {"model/x": torch.ones(3)}, 2)
    assert names(tmp_path) == [files.step_name(1)]


def test_what_a_crash_leaves_is_cleared_away(tmp_path):
    write(make_writer(tmp_path), {"model/x": torch.ones(3)}, 1)
    for leftover in ("step_00000002.tmp", "step_00000003.going.tmp"):
        shutil.copytree(tmp_path / files.step_name(1), tmp_path / leftover)
    (tmp_path / "best.json.tmp").write_text("{")
    assert [c.step for c in files.find(tmp_path)[0]] == [1]
    files.remove_unfinished(tmp_path)
    assert names(tmp_path) == [files.step_name(1)]


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """What is written is what was there when it was asked for."""
    begin, save = threading.Event(), dcp.save

    def slow(*arguments, **options):
        assert begin.wait(60)
        return save(*arguments, **options)

    monkeypatch.setattr(dcp, "save", slow)
    writer, weight = make_writer(tmp_path, asynchronous=True), torch.zeros(1000)
    writer.write({"model/x": weight}, {"step": 1, "best": None})
    assert writer.finished() is None
    weight.fill_(7)
    begin.set()
    path = writer.wait()
    assert torch.equal(checkpoint_tensors(path)["model/x"], torch.zeros(1000))
    writer.write({"model/x": weight}, {"step": 2, "best": None})  # the copy is used again
    assert torch.equal(checkpoint_tensors(writer.wait())["model/x"], torch.full((1000,), 7.0))
    writer.close()


def test_a_wait_that_a_signal_ends_leaves_the_write_under_way(tmp_path, monkeypatch):
    """Its copy is not written over before it is on the disk."""
    begin, save = threading.Event(), dcp.save
    monkeypatch.setattr(dcp, "save", lambda *a, **k: begin.wait(60) and save(*a, **k))
    writer = make_writer(tmp_path, asynchronous=True)
    writer.write({"model/x": torch.ones(3)}, {"step": 1, "best": None})
    with monkeypatch.context() as patched:
        patched.setattr(writer._writing, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.wait()
    with pytest.raises(AssertionError, match="has not been asked for"):
        writer.write({"model/x": torch.zeros(3)}, {"step": 2, "best": None})
    begin.set()
    assert torch.equal(checkpoint_tensors(writer.wait())["model/x"], torch.ones(3))
    writer.close()


def interrupted():
    raise KeyboardInterrupt


def test_an_error_that_is_no_io_error_comes_as_it_is(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(dcp, "save", broken)
    writer = make_writer(tmp_path, asynchronous=True)
    writer.write({"model/x": torch.ones(3)}, {"step": 1, "best": None})
    with pytest.raises(ValueError, match="a mistake of ours"):
        writer.wait()
    assert names(tmp_path) == []
    writer.close()


@pytest.fixture
def small_disk(tmp_path):
    """Four MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
        ).returncode
    except FileNotFoundError:
        made = 1
    if made != 0:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("seen_before", [True, False])
def test_a_full_disk(small_disk, monkeypatch, seen_before):
    """Whether it is full already or becomes so: nothing is left of the new one, the old one is
    whole, and the next is written when there is room."""
    if not seen_before:
        plenty = shutil._ntuple_diskusage(10**12, 0, 10**12)
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: plenty)
    writer = make_writer(small_disk, keep_last=1)
    tensors = {f"model/{i}": torch.full((100_000,), float(i)) for i in range(5)}
    write(writer, tensors, 1)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_200_000))
    with pytest.raises(WriteFailed, match="GB free of the" if seen_before else "No space left"):
        write(writer, tensors, 2)
    assert names(small_disk) == ["ballast", files.step_name(1)]
    checkpoint = files.newest(small_disk)
    files.verify(checkpoint, checkpoint.document["files"])
    ballast.unlink()
    write(writer, {"model/x": torch.ones(3)}, 3)
    assert json.loads((small_disk / files.step_name(3) / files.DOCUMENT).read_text())["step"] == 3
