"""bfloat16 weights: updates that round away are noticed, and stochastic rounding keeps them."""

import pytest
import torch

from oprd.config import check_values
from oprd.config.demo import demo_config
from oprd.errors import ConfigError
from oprd.training.rounding import StochasticAdamW, UpdateWatch, stochastic_round_
from oprd.training.trainer import train
from tests.oprd.training.test_trainer import steps_of
from tests.support.runs import small_run


def test_rounding_is_right_on_average():
    x = torch.tensor([1.0, -3.14159, 1e-30, 65504.0, 0.3]).repeat_interleave(20000)
    rounded = x.clone()
    stochastic_round_(rounded, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, rounded.bfloat16().float())
    for exact, chosen in zip(x.view(5, -1), rounded.view(5, -1), strict=True):
        ulp = (exact[0].abs() / 128).item()
        assert (chosen - exact).abs().max() <= ulp
        assert abs((chosen - exact).double().mean().item()) < 0.02 * ulp
    assert torch.equal(rounded[:20000], x[:20000])  # 1.0 is a bfloat16 number


def test_what_is_bfloat16_already_stays():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 2.0**-133, 1.5])
    rounded = x.clone()
    stochastic_round_(rounded, torch.Generator().manual_seed(0))
    assert torch.equal(rounded, x)


def steps(optimizer, parameter, number):
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        parameter.grad = (1 + torch.rand(parameter.shape, generator=generator)).to(parameter.dtype)
        optimizer.step()


def test_float32_parameters_are_updated_as_by_torch():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 100)) for _ in range(2))
    steps(StochasticAdamW([ours], lr=1e-2, weight_decay=0.1), ours, 10)
    steps(torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1), theirs, 10)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_small_updates_add_up():
    """200 steps of 1e-5 move weights near 1, whose neighbours are 0.004 away, by 0.002."""
    start = torch.ones(20000, dtype=torch.bfloat16)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    steps(StochasticAdamW([ours], lr=1e-5, weight_decay=0.0), ours, 200)
    steps(torch.optim.AdamW([theirs], lr=1e-5, weight_decay=0.0), theirs, 200)
    assert torch.equal(theirs.data, start)
    assert (start - ours).double().mean().item() == pytest.approx(200e-5, rel=0.1)


def test_a_part_in_the_middle_is_no_other_update(monkeypatch):
    results = []
    for at_once in (7, 1000):
        monkeypatch.setattr("oprd.training.rounding.UPDATED_AT_ONCE", at_once)
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 50).view(5, 10).T)  # not contiguous
        steps(StochasticAdamW([parameter], lr=1e-2), parameter, 3)
        results.append(parameter.data)
    torch.testing.assert_close(*results)


def test_state_goes_on_with_the_same_bits():
    whole, cut = (torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2))
    torch.manual_seed(0)
    gradients = torch.randn(6, 1000).bfloat16()

    def run(optimizer, parameter, rows):
        for row in rows:
            parameter.grad = row.clone()
            optimizer.step()

    run(StochasticAdamW([whole], lr=1e-3, seed=3), whole, gradients)
    first = StochasticAdamW([cut], lr=1e-3, seed=3)
    run(first, cut, gradients[:3])
    second = StochasticAdamW([cut], lr=1e-3, seed=3)
    second.load_state_dict(first.state_dict())
    run(second, cut, gradients[3:])
    assert torch.equal(whole, cut)
    assert second.state[cut]["exp_avg"].dtype == torch.float32


def test_unchanged_weights_are_counted():
    moved, still = (torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16)) for _ in range(2))
    watch = UpdateWatch([moved, still])
    moved.grad, still.grad = torch.ones(10).bfloat16(), torch.ones(10).bfloat16()
    still.grad[:5] = 0  # not looked at: nothing asks these to change
    with watch.watching():
        moved.data += 1
    assert watch.metrics() == {"actor/unchanged_weights": pytest.approx(5 / 15)}
    other = UpdateWatch([torch.nn.Parameter(torch.ones(2))])
    with other.watching():
        pass
    assert other.metrics() == {}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_run_says_that_updates_round_away(tmp_path, capsys, rounding):
    changes = {"student__dtype": "bfloat16", "optim__lr": 1e-6, "optim__rounding": rounding}
    train(small_run(tmp_path / "run", steps=6, eval__sets={}, eval__teacher=False, **changes))
    shares = [s.get("actor/unchanged_weights", 0) for s in steps_of(tmp_path / "run")]
    warned = "optim.rounding=stochastic" in capsys.readouterr().out
    assert warned == (min(shares) > 0.9) == (rounding == "nearest")


def test_float32_weights_need_no_rounding():
    cfg = demo_config()
    cfg.optim.rounding = "stochastic"
    with pytest.raises(ConfigError, match="is for bfloat16 weights"):
        check_values(cfg)
