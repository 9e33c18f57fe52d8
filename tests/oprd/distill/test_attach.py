"""Taps give the loss and gradients that `output_hidden_states=True` and the reference give."""

import copy

import pytest
import torch
from torch import nn

from oprd import attach
from oprd.data.collate import collate
from oprd.data.rollout import Rollout
from oprd.data.supervision import supervise
from oprd.models.decoder import cut, find_decoder, watch
from oprd.models.layer_pairs import corresponding_layer, pair_layers, select_layers
from oprd.tokenizers.alignment import Reading
from oprd_kernels import fused_rep_loss
from tests.support.tiny import ARCHITECTURES, make_batch, make_model


def expected(student, teacher, batch, layers, kind="mse", **supervision):
    """Loss and gradients by the book: every hidden state of both whole models, then cut."""
    ids, attention, response = batch
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    call = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    student.zero_grad()
    h_s = student(**call, output_hidden_states=True).hidden_states
    with torch.no_grad():
        h_t = teacher(**call, output_hidden_states=True).hidden_states
    chosen = supervise(response, **supervision)
    losses = [
        fused_rep_loss(
            h_s[s + 1],
            h_t[t + 1].flatten(0, 1)[chosen.rows],
            rows=chosen.rows,
            weights=chosen.weights,
            denominator=chosen.total,
            kind=kind,
            backend="reference",
        )
        for s, t in pair_layers(layers, len(h_s) - 1, len(h_t) - 1)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    return torch.stack(losses).detach(), gradients(student)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, wanted):
    assert torch.allclose(actual[0], wanted[0], rtol=1e-5, atol=1e-7)
    assert actual[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        scale = gradient.abs().max()
        assert torch.allclose(actual[1][name], gradient, rtol=1e-4, atol=1e-5 * scale), name


def attached(student, teacher, batch, **options):
    distiller = attach(student, teacher, **options)
    student.zero_grad()
    out = distiller(*batch)
    out.loss.backward()
    distiller.detach()
    return out.layer_losses, gradients(student)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "on", "reentrant"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_every_gradient(architecture, padding, checkpointing):
    student, teacher = make_model(architecture), make_model(architecture, seed=1)
    batch = make_batch(padding)
    student.train()
    wanted = expected(student, teacher, batch, "all", positions="all")
    if checkpointing is not None:
        student.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        student.enable_input_require_grads()  # reentrant checkpoints want an input with gradient
    assert_same(attached(student, teacher, batch, positions="all"), wanted)


@pytest.mark.parametrize("layers", ["last", "even", "odd", [0], [2, 1]], ids=str)
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_selected_layers(architecture, layers):
    student, teacher = make_model(architecture), make_model(architecture, seed=1)
    wanted = expected(student, teacher, make_batch(), layers)
    assert_same(attached(student, teacher, make_batch(), layers=layers), wanted)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean"])
@pytest.mark.parametrize("shift", ["after", "before"])
@pytest.mark.parametrize("positions", ["all", "last", "last_k", "first_k"])
@pytest.mark.parametrize("kind", ["mse", "nmse", "cosine"])
def test_positions_shift_and_reduction(kind, positions, shift, reduction):
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    options = {"positions": positions, "k": 3, "shift": shift, "reduction": reduction}
    wanted = expected(student, teacher, make_batch(), "all", kind, **options)
    assert_same(attached(student, teacher, make_batch(), kind=kind, **options), wanted)


def test_a_teacher_that_reads_other_tokens():
    """By hand, state by state: the second rollout's teacher reads two tokens for the student's two,
    which end together only at the last; the first's has a longer prompt."""
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    rollouts = [
        Rollout([5, 6], [7, 8, 2], False, reading=Reading([9, 5, 6], [7, 8, 2])),
        Rollout([4], [10, 11], True, reading=Reading([12], [13, 14], pairs=[(1, 1)])),
    ]
    batch = collate(rollouts, pad_id=0, device="cpu")
    partners = [([1, 2, 3], [2, 3, 4]), ([0], [0])]  # states before the tokens, in positions
    student.zero_grad()
    total = 0.0
    for r, (ours, theirs) in zip(rollouts, partners, strict=True):
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        read = torch.tensor([r.reading.prompt_ids + r.reading.response_ids])
        h_s = student(ids, output_hidden_states=True).hidden_states[1:]
        with torch.no_grad():
            h_t = teacher(read, output_hidden_states=True).hidden_states[1:]
        for s, t in zip(h_s, h_t, strict=True):
            total = total + (s[0, ours] - t[0, theirs]).square().mean(-1).sum() / 4 / len(h_s)
    total.backward()
    wanted = gradients(student)
    distiller = attach(student, teacher, positions="all", shift="before")
    student.zero_grad()
    inputs = batch.input_ids, batch.attention_mask, batch.response_mask
    out = distiller(*inputs, reading=batch.reading, partner=batch.partner)
    out.loss.backward()
    assert out.num_valid == 4
    assert_same((out.loss.detach(), gradients(student)), (total.detach(), wanted))
    with pytest.raises(ValueError, match="reading and partner belong together"):
        distiller(*inputs, partner=batch.partner)
    with pytest.raises(ValueError, match=r"partner has shape \(2, 4\) and input_ids \(2, 5\)"):
        distiller(*inputs, reading=batch.reading, partner=batch.partner[:, :-1])


def test_a_deeper_teacher_is_matched_by_relative_depth():
    student = make_model("qwen2")
    teacher = make_model("qwen2", seed=1, num_hidden_layers=5)
    wanted = expected(student, teacher, make_batch(), "all")
    assert_same(attached(student, teacher, make_batch()), wanted)


def test_neither_head_runs_and_the_teacher_stops_where_it_is_not_needed(monkeypatch):
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    distiller = attach(student, teacher, layers=[0, 1])
    for model in (student, teacher):
        monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("LM head called"))
    monkeypatch.setattr(
        teacher.model.layers[2], "forward", lambda *_, **__: pytest.fail("teacher not cut")
    )
    distiller(*make_batch()).loss.backward()
    assert student.lm_head.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())


def test_only_supervised_rows_of_the_teacher_are_kept():
    distiller = attach(make_model("qwen2"), make_model("qwen2", seed=1))
    states = distiller.teacher_states(*make_batch()[:2], torch.tensor([3, 9]))
    assert [tuple(s.shape) for s in states] == [(2, 32)] * 3
    assert all(s.untyped_storage().nbytes() == 2 * 32 * 4 for s in states)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
def test_cut_leaves_the_original_whole_and_computes_the_same(architecture):
    model = make_model(architecture).eval()
    ids, attention, _ = make_batch()
    decoder = find_decoder(model)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=attention, output_hidden_states=True)
        short = []
        with watch(cut(decoder, 2), [1], 3, lambda _, h: short.append(h)):
            cut(decoder, 2).forward(ids, attention)
        again = model(input_ids=ids, attention_mask=attention)
    keep = attention.bool()
    assert torch.allclose(short[0][keep], whole.hidden_states[2][keep], atol=1e-6)
    assert torch.equal(again.logits, whole.logits)
    assert decoder.num_layers == 3


def test_taps_in_a_forward_pass_of_ones_own():
    """The student's own call, LM head and all, compared on the way."""
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    ids, attention, response = make_batch()
    chosen = supervise(response)
    distiller = attach(student, teacher)
    states = distiller.teacher_states(ids, attention, chosen.rows)
    with distiller.taps(states, chosen.rows) as session:
        logits = student(input_ids=ids, attention_mask=attention).logits
    out = session.output()
    (out.loss + logits.logsumexp(-1).mean()).backward()
    assert student.lm_head.weight.grad is not None
    assert torch.allclose(out.loss, distiller(ids, attention, response).loss)
    assert out.num_valid == chosen.total


def test_two_forwards_before_two_backwards_with_checkpointing():
    """Recomputation must meet the targets of its own forward pass."""
    student, teacher = make_model("qwen2").train(), make_model("qwen2", seed=1)
    first, second = make_batch(seed=0), make_batch(seed=5)
    _, a = expected(student, teacher, first, "all")
    _, b = expected(student, teacher, second, "all")
    student.gradient_checkpointing_enable({"use_reentrant": False})
    distiller = attach(student, teacher)
    student.zero_grad()
    one, two = distiller(*first).loss, distiller(*second).loss
    one.backward()
    two.backward()
    summed = {name: a[name] + b[name] for name in a}
    assert_same((one.detach(), gradients(student)), (one.detach(), summed))


def test_no_supervised_token_gives_zero_connected_to_the_graph():
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    ids, attention, response = make_batch()
    out = attach(student, teacher)(ids, attention, torch.zeros_like(response))
    out.loss.backward()
    assert out.loss == 0
    assert out.num_valid == 0
    assert all((g == 0).all() for g in gradients(student).values())
    assert "model.embed_tokens.weight" in gradients(student)


def test_bfloat16_models():
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    wanted, _ = expected(student, teacher, make_batch(), "all")
    losses, grads = attached(student.bfloat16(), teacher.bfloat16(), make_batch())
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, wanted, rtol=0.05)
    assert {g.dtype for g in grads.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_compiled_layers():
    student, teacher = make_model("llama"), make_model("llama", seed=1)
    wanted = expected(student, teacher, make_batch(), "all")
    for layer in (*student.model.layers, *teacher.model.layers):
        layer.compile(backend="aot_eager")
    assert_same(attached(student, teacher, make_batch()), wanted)


def test_teacher_may_be_the_student():
    model = make_model("qwen2")
    out = attach(model, model)(*make_batch())
    out.loss.backward()
    assert out.loss == 0


def test_detach_restores_the_student_and_deepcopy_and_state_dict_work_while_attached():
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    classes, keys = [type(m) for m in student.modules()], list(student.state_dict())
    distiller = attach(student, teacher)
    assert list(student.state_dict()) == keys
    copied = copy.deepcopy(student)
    ids, attention, _ = make_batch()
    assert torch.equal(copied(ids, attention).logits, student(ids, attention).logits)
    distiller.detach()
    assert [type(m) for m in student.modules()] == classes
    with pytest.raises(RuntimeError, match="removed the student's taps"):
        distiller(*make_batch())
    attach(student, teacher)


def test_misuse_is_explained():
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    with pytest.raises(ValueError, match="not a decoder that oprd knows"):
        attach(nn.Sequential(nn.Linear(2, 2)), teacher)
    with pytest.raises(ValueError, match="student is 32 wide and the teacher 48"):
        attach(student, make_model("qwen2", hidden_size=48))
    with pytest.raises(ValueError, match="several at once"):
        attach(student, make_model("qwen2", num_hidden_layers=2))
    with pytest.raises(ValueError, match="kind must be one of"):
        attach(student, teacher, kind="l1")
    distiller = attach(student, teacher)
    with pytest.raises(ValueError, match="already has taps"):
        attach(student, teacher)
    ids, attention, _ = make_batch()
    rows = torch.tensor([1])
    states = distiller.teacher_states(ids, attention, rows)
    with (
        pytest.raises(ValueError, match="1 tensors for 3 layers"),
        distiller.taps(states[:1], rows),
    ):
        pass
    with (
        distiller.taps(states, rows),
        pytest.raises(RuntimeError, match="already open"),
        distiller.taps(states, rows),
    ):
        pass
    with distiller.taps(states, rows) as session:
        pass
    with pytest.raises(RuntimeError, match="0 of 3 taps were reached"):
        session.output()
    with distiller.taps(states, rows):
        student(ids, attention)
        with pytest.raises(RuntimeError, match="ran twice"):
            student(ids, attention)


def test_layer_selection():
    assert select_layers("last", 5) == [4]
    assert select_layers("all", 3) == [0, 1, 2]
    assert select_layers("even", 5) == [0, 2, 4]
    assert select_layers("odd", 5) == [1, 3]
    assert select_layers([3, 1], 5) == [1, 3]
    for spec, message in [
        ("first", "must be one of"),
        ([], "empty"),
        ([5], r"counted 0 \.\. 4"),
        ([1, 1], "twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            select_layers(spec, 5)
    with pytest.raises(ValueError, match="selects nothing"):
        select_layers("odd", 1)


@pytest.mark.parametrize(("student", "teacher"), [(28, 36), (28, 32), (4, 5), (1, 7), (12, 12)])
def test_correspondence_is_eq_11(student, teacher):
    """phi(l) = round((l - 1) / (L_S - 1) * (L_T - 1)) + 1."""
    for block in range(student):
        found = corresponding_layer(block, student, teacher)
        if student == 1:
            assert found == teacher - 1
        else:
            exact = block / (student - 1) * (teacher - 1)
            assert abs(found - exact) <= 0.5 + 1e-9
    assert corresponding_layer(student - 1, student, teacher) == teacher - 1
    if student > 1:
        assert corresponding_layer(0, student, teacher) == 0
