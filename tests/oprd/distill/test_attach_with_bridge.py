"""Taps with a bridge: Eq. 14-15 in plain PyTorch on `output_hidden_states=True`."""

import pytest
import torch
from torch.nn.functional import normalize

from oprd import attach
from oprd.bridge.bank import Bridge, BridgeInfo
from oprd.data.supervision import supervise
from oprd.errors import ConfigError
from oprd.models.decoder import find_decoder
from oprd.models.info import ModelInfo
from oprd.models.layer_pairs import corresponding_layer, pair_layers
from tests.oprd.distill.test_attach import assert_same, attached, gradients
from tests.support.tiny import make_batch, make_model

RANK = 5


def make_bridge(student, teacher, rank=RANK):
    """Random projectors for every student layer."""
    s, t = find_decoder(student), find_decoder(teacher)
    pairs = [(b, corresponding_layer(b, s.num_layers, t.num_layers)) for b in range(s.num_layers)]
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return {b: torch.randn(*shape, generator=generator) for b, _ in pairs}

    info = BridgeInfo(
        ModelInfo(s.width, s.num_layers), ModelInfo(t.width, t.num_layers), pairs, rank, "ridge"
    )
    return Bridge(normal(rank, s.width), normal(rank, t.width), normal(t.width), info)


def expected(student, teacher, batch, bridge, layers, kind, **supervision):
    """Loss by layer, and the gradients of their mean."""
    ids, attention, response = batch
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    call = {"input_ids": ids, "attention_mask": attention, "position_ids": positions}
    student.zero_grad()
    h_s = student(**call, output_hidden_states=True).hidden_states
    with torch.no_grad():
        h_t = teacher(**call, output_hidden_states=True).hidden_states
    chosen = supervise(response, **supervision)
    losses = []
    for s, t in pair_layers(layers, len(h_s) - 1, len(h_t) - 1):
        z_s = h_s[s + 1].flatten(0, 1)[chosen.rows] @ bridge.student_proj[s].T
        centred = h_t[t + 1].flatten(0, 1)[chosen.rows] - bridge.teacher_mean[s]
        z_t = centred @ bridge.teacher_proj[s].T
        if kind != "mse":
            z_s, z_t = normalize(z_s, dim=-1), normalize(z_t, dim=-1)
        row = (z_s - z_t).square().sum(-1) / (2 if kind == "cosine" else bridge.info.rank)
        weights = torch.ones_like(row) if chosen.weights is None else chosen.weights
        losses.append((weights * row).sum() / chosen.total)
    torch.stack(losses).mean().backward()
    return torch.stack(losses).detach(), gradients(student)


@pytest.mark.parametrize("kind", ["nmse", "mse", "cosine"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("students", "teachers"), [("qwen2", "phi3"), ("gpt2", "qwen3"), ("gemma3", "gpt_neox")]
)
def test_another_width_depth_and_architecture(students, teachers, padding, kind):
    student, batch = make_model(students), make_batch(padding)
    wider = {"hidden_size": 48, "num_hidden_layers": 5}
    teacher = make_model(teachers, seed=1, **wider)
    bridge = make_bridge(student, teacher)
    student.eval()
    wanted = expected(student, teacher, batch, bridge, "all", kind, positions="all")
    assert_same(
        attached(student, teacher, batch, bridge=bridge, kind=kind, positions="all"), wanted
    )


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "on", "reentrant"])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean"])
@pytest.mark.parametrize("layers", ["all", "last", [0, 2]], ids=str)
def test_checkpointing_reductions_and_layers(layers, reduction, checkpointing):
    student = make_model("llama")
    teacher = make_model("llama", seed=1, hidden_size=24, num_hidden_layers=6)
    batch, bridge = make_batch(), make_bridge(student, teacher)
    student.train()
    options = {"positions": "last_k", "k": 4, "shift": "before", "reduction": reduction}
    wanted = expected(student, teacher, batch, bridge, layers, "nmse", **options)
    if checkpointing is not None:
        student.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        student.enable_input_require_grads()
    options |= {"bridge": bridge, "kind": "nmse", "layers": layers}
    assert_same(attached(student, teacher, batch, **options), wanted)


def test_a_bridge_is_used_where_the_widths_are_equal():
    student, teacher, batch = make_model("qwen2"), make_model("qwen2", seed=1), make_batch()
    bridge = make_bridge(student, teacher)
    wanted = expected(student, teacher, batch, bridge, "all", "mse", positions="all")
    actual = attached(student, teacher, batch, bridge=bridge, positions="all")
    assert_same(actual, wanted)
    assert not torch.allclose(actual[0], attached(student, teacher, batch, positions="all")[0])


def test_a_lower_rank_is_compared_in_fewer_dimensions():
    student, batch = make_model("qwen2"), make_batch()
    teacher = make_model("qwen2", seed=1, hidden_size=64)
    bridge = make_bridge(student, teacher).at_rank(2)
    distiller = attach(student, teacher, bridge=bridge, kind="nmse")
    assert distiller.compared_width == 2
    out = distiller(*batch)
    assert torch.allclose(out.layer_losses, 2 * (1 - out.layer_cosine) / 2, rtol=1e-4)
    distiller.detach()
    assert attach(student, make_model("qwen2")).compared_width == 32


def test_of_the_teacher_only_projected_rows_are_kept():
    student, (ids, attention, response) = make_model("qwen2"), make_batch()
    teacher = make_model("qwen2", seed=1, hidden_size=64).to(torch.bfloat16)
    distiller = attach(student, teacher, bridge=make_bridge(student, teacher))
    chosen = supervise(response, "all")
    states = distiller.teacher_states(ids, attention, chosen.rows)
    assert [tuple(z.shape) for z in states] == [(chosen.total, RANK)] * 3
    assert all(z.untyped_storage().nbytes() == z.numel() * 4 for z in states)
    out = distiller.student_loss(ids, attention, chosen.rows, states)
    out.loss.backward()
    assert out.loss.isfinite()


def test_nothing_but_the_student_has_a_gradient():
    student, batch = make_model("qwen2"), make_batch()
    teacher = make_model("qwen2", seed=1, hidden_size=64)
    bridge = make_bridge(student, teacher)
    before = {b: p.clone() for b, p in bridge.student_proj.items()}
    attach(student, teacher, bridge=bridge)(*batch).loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    for block, proj in bridge.student_proj.items():
        assert not proj.requires_grad
        assert torch.equal(proj, before[block])


def test_without_a_bridge_or_with_another_pairs_the_error_says_what_to_do():
    student = make_model("qwen2")
    wide, deep = (make_model("qwen2", seed=1, hidden_size=w) for w in (64, 48))
    with pytest.raises(ValueError, match=r"32 wide and the teacher 64.*oprd-bridge fit"):
        attach(student, wide)
    with pytest.raises(ConfigError, match="a teacher 48 wide, this one is 64 wide"):
        attach(student, wide, bridge=make_bridge(student, deep))
    deeper = make_model("qwen2", seed=1, hidden_size=64, num_hidden_layers=4)
    with pytest.raises(ConfigError, match="teacher of 3 layers, this one has 4"):
        attach(student, deeper, bridge=make_bridge(student, wide))
    attach(student, wide, bridge=make_bridge(student, wide)).detach()
