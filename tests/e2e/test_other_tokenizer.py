"""A teacher with another tokenizer, from prompts to gradients, and the refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oprd.bridge.bank import BridgeInfo, load_bridge, read_info, save_bridge
from oprd.bridge.fit import fit
from oprd.cli import bridge as bridge_cli
from oprd.cli import train as cli
from oprd.config import BridgeConfig, PromptsConfig, TeacherConfig
from oprd.data.chat import end_of_turn
from oprd.data.prompts import load_prompts
from oprd.data.rollout import Rollout, for_teacher
from oprd.demo.bridge_teacher import make_olmo, make_pair_tokenizer, make_teacher
from oprd.demo.task import make_tokenizer
from oprd.errors import ConfigError
from oprd.models.loading import load_model, load_tokenizer
from oprd.tokenizers.alignment import Aligner
from oprd.training.preflight import preflight
from oprd.training.setup import Builder
from oprd.training.trainer import train
from tests.oprd.training.test_trainer import lines, small_run
from tests.support.bridges import add_teachers, demo_fit, write_teachers

PAIRS = make_pair_tokenizer()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Of another width, depth and tokenizer; it knows nothing."""
    directory = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    make_olmo(PAIRS, width=64, layers=6).save_pretrained(directory)
    PAIRS.save_pretrained(directory)
    return str(directory)


def fit_config(path, teacher, **changes):
    cfg = demo_fit(path, teacher, rank=4, prompts=60, **changes)
    cfg.data.train.limit = 60
    return cfg


def run_config(directory, teacher, bridge, **changes):
    cfg = small_run(directory, teacher=TeacherConfig(teacher), **changes)
    cfg.bridge = BridgeConfig(str(bridge))
    cfg.distill = replace(cfg.distill, kind="nmse")
    return cfg


def test_prompts_carry_what_the_teacher_reads(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "952+304=", "answer": "6521"}) + "\n")
    cfg = small_run(tmp_path / "run").data
    found = load_prompts(
        PromptsConfig(str(file)), cfg, make_tokenizer(), teacher_tokenizers={"": PAIRS}
    )
    (prompt,) = found.prompts
    assert PAIRS.convert_ids_to_tokens(prompt.teacher_ids) == [*"952+304="]
    assert prompt.teacher_end_id == PAIRS.eos_token_id
    aligner = Aligner(make_tokenizer(), PAIRS)
    ids = make_tokenizer()("685")["input_ids"]
    truncated = for_teacher(Rollout(prompt.token_ids, ids, True), prompt, {"": aligner}, [1])
    assert PAIRS.convert_ids_to_tokens(truncated.reading.response_ids) == ["6", "85"]
    assert truncated.reading.pairs == [(0, 0), (2, 1)]  # not "8", and no end was read
    ended = for_teacher(Rollout(prompt.token_ids, [*ids, 1], False), prompt, {"": aligner}, [1])
    assert ended.reading.pairs == [(0, 0), (2, 1), (3, 2)]
    early = for_teacher(Rollout(prompt.token_ids, [*ids[:2], 1], False), prompt, {"": aligner}, [1])
    assert early.reading.pairs == [(0, 0), (2, 2)]  # to the teacher a lone "8" is the last digit


def test_end_of_turn_is_what_the_template_writes():
    tokenizer = make_tokenizer()
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<turn>")


def test_fit_and_train(tmp_path, teacher, monkeypatch, capsys):
    """States are compared where both tokenizers' tokens end, whatever the shapes."""
    path = tmp_path / "bridge.safetensors"
    fit(fit_config(path, teacher))
    said = capsys.readouterr().out
    share = int(re.search(r"(\d+)% of the student's tokens end where the teacher's do", said)[1])
    assert 60 < share < 95
    assert "nothing is compared" not in said
    monkeypatch.setattr("oprd.bridge.fit.FEW_PAIRS", 0.95)
    fit(fit_config(tmp_path / "again.safetensors", teacher))
    assert "nothing is compared" in capsys.readouterr().out
    info = read_info(path)
    assert info.teacher_input == "text"
    assert (info.student.width, info.teacher.width, info.teacher.layers) == (128, 64, 6)
    assert info.rows < 54 * 5 * 0.9  # some tokens have no partner
    summary = train(run_config(tmp_path / "run", teacher, path, steps=40, optim__lr=1e-3))
    steps = [line for line in lines(summary.directory) if "actor/grad_norm" in line]
    ratios = [s["align/ratio"] for s in steps]
    assert 0.6 < sum(ratios) / len(ratios) < 0.95
    assert all(s["rep/supervised_tokens"] > 8 for s in steps)
    losses = [s["actor/rep_loss"] for s in steps]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    evaluated = summary.evaluations["teacher"]["val"]
    assert 0 < evaluated.length <= 5  # it was asked in its own tokens


@pytest.mark.slow
def test_other_pairs_than_the_bridges_are_noted(tmp_path, teacher, capsys):
    path = tmp_path / "bridge.safetensors"
    cfg = fit_config(path, teacher)
    cfg.teacher.pairs = "all"
    fit(cfg)
    capsys.readouterr()
    bridge_cli.main(["show", str(path)])
    assert "text, pairs all" in capsys.readouterr().out

    def notes(cfg):
        return [note for note in preflight(cfg).notes if "with pairs" in note]

    run = run_config(tmp_path / "run", teacher, path)
    (note,) = notes(run)
    assert "fitted with pairs='all'" in note
    assert "this run has teacher.pairs='stable'" in note
    several = replace(run, teacher=TeacherConfig(), teachers={"train": run.teacher})
    assert "teachers.train.pairs='stable'" in notes(several)[0]
    run.teacher.pairs = "all"
    assert not notes(run)

    bridge = load_bridge(path)
    older = json.loads(bridge.info.to_json())
    del older["teacher_pairs"]
    info = BridgeInfo.from_json(json.dumps(older))
    assert info.teacher_pairs is None
    save_bridge(replace(bridge, info=info), tmp_path / "older.safetensors")
    assert not notes(run_config(tmp_path / "run", teacher, tmp_path / "older.safetensors"))


def test_student_ids_is_what_public_code_does(tmp_path, teacher):
    path = tmp_path / "bridge.safetensors"
    cfg = fit_config(path, teacher)
    cfg.teacher.reads = "student_ids"
    fit(cfg)
    info = load_bridge(path).info
    assert (info.teacher_input, info.teacher_pairs) == ("student_ids", None)
    run = run_config(tmp_path / "run", teacher, path)
    with pytest.raises(ConfigError, match="read 'student_ids', and this run's reads 'text'"):
        preflight(run)
    run.teacher.reads = "student_ids"
    found = preflight(run)
    assert not found.aligners
    assert any("mean something else to it" in note for note in found.notes)
    steps = lines(train(run).directory)
    assert not any("align/ratio" in line for line in steps)


def test_a_bridge_for_each_teacher(tmp_path):
    """One of the student's tokenizer and width, one of neither, for prompts of their own."""
    write_teachers(tmp_path)
    cfg = small_run(tmp_path / "run", distill__kind="nmse")
    add_teachers(cfg, tmp_path, rank=3)
    made = Builder(cfg, torch.device("cpu")).objectives()
    for name, given in cfg.bridges.items():
        bridge = load_bridge(given.path, 3)
        found = made.teachers[name].distiller.projectors.bridge
        assert torch.equal(found.student_proj[1], bridge.student_proj[1])
        assert torch.equal(found.teacher_proj[1], bridge.teacher_proj[1])
        assert made.teachers[name].distiller.teacher.width == bridge.info.teacher.width
    steps = [line for line in lines(train(cfg).directory) if "actor/grad_norm" in line]
    assert all(s["actor/grad_norm"] > 0 for s in steps)
    assert any(s["align/ratio"] < 1 for s in steps)

    def refused(message):
        with pytest.raises(ConfigError, match=message):
            preflight(replace(cfg, output_dir=str(tmp_path / "not")))

    cfg.bridges["same"].rank = None
    refused(r"bridges have different ranks \(same: 4, other: 3\).* set bridges.same.rank .* to 3")
    cfg.bridges["same"] = cfg.bridges["other"]
    refused("it was fitted for a teacher 64 wide")
    cfg.bridge = BridgeConfig(str(tmp_path / "same"))
    refused("both bridge and bridges are given")
    cfg.bridges = {}
    refused("is fitted for one teacher, but teachers has 2: give each teacher its own bridge")
    cfg.bridge = BridgeConfig()
    cfg.bridges = {"same": BridgeConfig("x")}
    refused("bridges has same, and teachers same, other: name one bridge for each")
    cfg.teachers["same"] = cfg.teachers["other"]
    cfg.bridges["other"] = BridgeConfig("y")
    refused("are one model with different bridges")
    cfg.objectives, cfg.bridges["same"].path = {"opd_full": 1.0}, None
    refused("bridges: each needs a path")
    refused("bridges are given, but objectives .* compare no hidden states")


def test_mistakes_are_explained(tmp_path, teacher):
    path = tmp_path / "bridge.safetensors"
    fit(fit_config(path, teacher))
    cfg = run_config(tmp_path / "run", teacher, path, objectives={"oprd": 1.0, "opd_full": 1.0})
    with pytest.raises(ConfigError, match="opd_full compare distributions over one"):
        preflight(cfg)
    small = tmp_path / "small"
    torch.manual_seed(0)
    shrunk = make_olmo(PAIRS, width=64, layers=2)
    shrunk.resize_token_embeddings(10)
    shrunk.save_pretrained(small)
    PAIRS.save_pretrained(small)
    fed = fit_config(tmp_path / "b", str(small))
    fed.teacher.reads = "student_ids"
    with pytest.raises(ConfigError, match="token id 14 is beyond the teacher's 10 embedding rows"):
        fit(fed)


def test_the_demos_recipes_belong_together():
    recipes = Path(__file__).parents[2] / "recipes"
    file = str(recipes / "demo_other_tokenizer_fit.yaml")
    fitted = bridge_cli.make_parser().parse_args(["fit", "--config", file]).fit
    parser = cli.make_parser()
    file = str(recipes / "demo_other_tokenizer.yaml")
    cfg = cli.to_config(parser.instantiate(parser.parse_args(["--config", file])))
    assert cfg.bridge.path == fitted.output
    assert cfg.bridge.rank <= fitted.rank
    assert cfg.teacher.path == fitted.teacher.path == "runs/demo_bridge/pairs"
    assert cfg.teacher.pairs == fitted.teacher.pairs == "stable"


def test_the_demos_teacher_is_made(tmp_path, capsys):
    """A few steps of it; `transformers` loads model and tokenizer as they were."""
    make_teacher(tmp_path, tokens="pairs", steps=2)
    assert "validation accuracy 0.0" in capsys.readouterr().out
    loaded = load_tokenizer(str(tmp_path / "pairs"))
    assert loaded.tokenize("12+97=") == [*"12+97="]
    assert loaded.tokenize("2081") == ["2", "0", "81"]
    model = load_model(TeacherConfig(str(tmp_path / "pairs")))
    assert model.config.hidden_size == 96
    assert model.get_input_embeddings().num_embeddings == len(loaded)
