"""The teacher of another shape computes what the model it was made of computes."""

from dataclasses import replace

import pytest
import torch

from benchmarks.stand_in_teacher import add_noise, same_function
from oprd.memory_plan.shapes import Shape
from oprd.models.layer_pairs import corresponding_layer
from tests.support.tiny import make_model


@pytest.fixture
def model():
    made = make_model("llama").eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2.0)
    return made


def larger(model):
    shape = Shape.of(model.config)
    return replace(
        shape,
        d=shape.d + 24,
        layers=shape.layers + 2,
        heads=2 * shape.heads,
        kv_heads=2 * shape.kv_heads,
        intermediate=shape.intermediate + 8,
    )


def test_logits_are_the_same_and_states_turned(model):
    shape = larger(model)
    wide = same_function(model, shape)
    assert Shape.of(wide.config) == replace(shape, tied=False)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m(ids, output_hidden_states=True) for m in (model, wide))
    torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-4, rtol=1e-4)
    for block in range(Shape.of(model.config).layers - 1):
        pair = corresponding_layer(block, model.config.num_hidden_layers, shape.layers)
        h, turned = ours.hidden_states[block + 1], theirs.hidden_states[pair + 1]
        torch.testing.assert_close(turned @ turned.mT, h @ h.mT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layers": 1}, "smaller in layers"), ({"kv_heads": 1}, "can't hold the model's: give")],
)
def test_a_shape_that_can_not_hold_the_model_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        same_function(model, replace(larger(model), **changes))


def test_noise_has_the_size_that_is_asked_for(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    add_noise(model, 0.1)
    assert ((weight - before).std() / before.std()).item() == pytest.approx(0.1, rel=0.1)
