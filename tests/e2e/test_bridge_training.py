"""Training with what ``oprd-bridge fit`` has written."""

import json

import pytest
from transformers import AutoModelForCausalLM

from oprd.bridge.fit import fit
from oprd.cli import train as cli
from oprd.errors import ConfigError
from tests.oprd.training.test_trainer import steps_of
from tests.support.bridges import bridged_run, small_fit, write_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def bridge_file(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("bridge") / "b.safetensors"
    fit(small_fit(path, teacher, prompts=400))
    return path


def test_fit_then_train_lowers_the_loss(bridge_file, teacher, tmp_path, capsys):
    """Half of the fitted rank, on the command line."""
    run = tmp_path / "run"
    cli.main(
        [
            *(f"--output_dir={run}", f"--teacher.path={teacher}", f"--bridge.path={bridge_file}"),
            *("--bridge.rank=4", "--distill.kind=nmse", "--steps=25", "--eval.sets={}"),
            *("--rollout.prompts_per_step=16", "--optim.lr=1e-3"),
        ]
    )
    steps = steps_of(run)
    losses = [s["actor/rep_loss"] for s in steps]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert steps[-1]["rep/cosine_similarity"] > steps[0]["rep/cosine_similarity"]
    for s in steps:
        # Every token counts the same, so the loss is 2 (1 - cos) / D at D = r, and not at D = d.
        assert s["rep/norm_mse"] == pytest.approx(s["actor/rep_loss"], rel=1e-3)
    assert json.loads((run / "summary.json").read_text())["steps"] == 25
    AutoModelForCausalLM.from_pretrained(run / "student")


@pytest.mark.parametrize(
    "changes",
    [
        {"objectives": {"opd_top1": 1.0, "oprd": 1.0}},
        {"autocast": "bfloat16", "teacher__dtype": "bfloat16"},
        {"student__dtype": "bfloat16", "student__gradient_checkpointing": True},
    ],
)
def test_a_bridge_in_mixed_precision_and_beside_other_objectives(
    bridge_file, teacher, tmp_path, changes
):
    from oprd.training.trainer import train

    options = {"steps": 1, "eval__sets": {}, "rollout__temperature": 0.0001}
    options |= {"distill__kind": "nmse"}
    train(bridged_run(tmp_path / "plain", teacher, bridge_file, **options))
    train(bridged_run(tmp_path / "other", teacher, bridge_file, **(options | changes)))
    plain, other = (steps_of(tmp_path / name)[0] for name in ("plain", "other"))
    assert other["actor/rep_loss"] == pytest.approx(plain["actor/rep_loss"], rel=0.05)
    assert other["rep/cosine_similarity"] == pytest.approx(plain["rep/cosine_similarity"], abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bridge__rank": 9}, r"rank 9 is not available in a bridge of rank 8"),
        ({"bridge__rank": 0}, "bridge.rank must be at least 1"),
        ({"bridge__path": None, "bridge__rank": 2}, r"bridge\.rank is given without bridge\.path"),
        ({"bridge__path": None}, "128 wide and the teacher 48: without a bridge.*oprd-bridge fit"),
        ({"bridge__path": "nowhere"}, "no bridge at nowhere"),
        ({"distill__init_head_from_teacher": True}, "128 wide and the teacher 48, so .* head does"),
        ({"objectives": {"opd_top1": 1.0}}, "compare no hidden states: add oprd"),
        ({"teacher__path": "demo:teacher"}, "a teacher 48 wide .*, this one is 128 wide"),
    ],
)
def test_training_refuses_before_loading(
    bridge_file, teacher, tmp_path, monkeypatch, changes, message
):
    from oprd.training.trainer import train

    monkeypatch.setattr("oprd.training.setup.load_model", None)
    cfg = bridged_run(tmp_path / "run", teacher, bridge_file, **changes)
    with pytest.raises(ConfigError, match=message):
        train(cfg)


def test_training_refuses_layers_and_tokenizers_that_are_not_the_bridges(
    bridge_file, teacher, tmp_path, monkeypatch
):
    from oprd.training.preflight import preflight

    partial = tmp_path / "partial.safetensors"
    fit(small_fit(partial, teacher, layers=[0, 3]))
    message = r"no projector for student block\(s\) \[1, 2\], only for \[0, 3\]"
    with pytest.raises(ConfigError, match=message):
        preflight(bridged_run(tmp_path / "run", teacher, partial))
    assert preflight(
        bridged_run(tmp_path / "run", teacher, partial, distill__layers=[3])
    ).layer_pairs == {"": [(3, 5)]}

    from oprd.models import info

    monkeypatch.setattr(info, "fingerprint", lambda vocabulary: "another")
    with pytest.raises(ConfigError, match="student with another tokenizer"):
        preflight(bridged_run(tmp_path / "run", teacher, bridge_file))


def test_another_shift_is_noted(bridge_file, teacher, tmp_path):
    from oprd.training.preflight import preflight

    notes = preflight(
        bridged_run(tmp_path / "run", teacher, bridge_file, distill__shift="after")
    ).notes
    assert any("fitted with shift='before'" in note for note in notes)
    assert not preflight(bridged_run(tmp_path / "run", teacher, bridge_file)).notes
