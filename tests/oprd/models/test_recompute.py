"""Recomputing the activations of some blocks changes memory and time, not gradients."""

import pytest
import torch

from oprd import attach
from oprd.errors import ConfigError
from oprd.models import recompute
from oprd.models.decoder import find_decoder
from oprd.models.recompute import recompute_blocks
from tests.support.tiny import make_batch, make_model


def update(student, teacher):
    """The student's gradients, and the blocks that ran in the backward pass."""
    ids, attention, response = make_batch()
    again = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *_, block=block: again.append(block))
        for block, layer in enumerate(find_decoder(student).layers)
    ]
    student.zero_grad()
    distiller = attach(student.train(), teacher, layers="all", positions="all")
    loss = distiller(ids, attention, response).loss
    again.clear()
    loss.backward()
    distiller.detach()
    for hook in hooks:
        hook.remove()
    return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}, again


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_first_blocks_run_again_and_gradients_stay(architecture):
    student, teacher = make_model(architecture), make_model(architecture, seed=1)
    layers = find_decoder(student).num_layers
    expected, again = update(student, teacher)
    assert again == []
    for number, first in ((1, 1), (True, layers), (layers - 1, layers - 1), (0, 0), (99, layers)):
        assert recompute_blocks(student, number) == first
        found, again = update(student, teacher)
        assert sorted(again) == list(range(first))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    recompute_blocks(student, False)
    assert update(student, teacher)[1] == []


def test_a_model_that_can_not_is_refused(monkeypatch):
    def refuse(*_):
        raise ValueError("LlamaForCausalLM is not compatible with gradient checkpointing.")

    monkeypatch.setattr(recompute, "_call", refuse)
    with pytest.raises(ConfigError, match="can't recompute activations"):
        recompute_blocks(make_model("llama"))
    monkeypatch.undo()
    model = make_model("llama")
    find_decoder(model).backbone.layers = torch.nn.ModuleList(
        torch.nn.ModuleList([layer]) for layer in find_decoder(model).layers
    )
    with pytest.raises(ConfigError, match="can't recompute 1 of its 3 blocks"):
        recompute_blocks(model, 1)
