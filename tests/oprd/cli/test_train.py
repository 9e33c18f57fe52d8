"""``oprd-train``'s configuration: defaults, files, mistakes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from oprd.bridge import Bridge, BridgeInfo, save_bridge
from oprd.checkpoint.resume import settings
from oprd.cli import train as cli
from oprd.cli.parser import parse_run
from oprd.config.demo import demo_config, demo_values
from oprd.config.io import from_values
from oprd.models.info import ModelInfo
from oprd.training.stages import stage_values

RECIPES = Path(__file__).parents[3] / "recipes"


def parse(*argv):
    parsed = parse_run(cli.make_parser, list(argv), demo_values())
    return cli.to_config(cli.make_parser().instantiate(parsed))


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_demo_recipe():
    assert parse() == demo_config()
    file = RECIPES / "demo.yaml"
    assert parse("--config", str(file)) == demo_config()
    assert yaml.safe_load(file.read_text()) == settings(demo_config())  # every option is there


def test_printed_config_reads_back(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse("--print_config", "--optim.lr=0.5")
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["optim"]["lr"] == 0.5
    expected = demo_config()
    expected.optim.lr = 0.5
    assert parse("--config", str(file)) == expected


def test_any_field_can_be_overridden_over_a_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("steps: 7\noptim: {lr: 0.1}\ndistill: {layers: [0, 2]}\n")
    cfg = parse(
        *("--config", str(file), "--optim.lr=0.2", "--optim.max_grad_norm=null"),
        *("--data.train.limit=5", "--data.chat_template_kwargs.enable_thinking=false"),
        "--eval.sets.val.every=3",
    )
    assert (cfg.steps, cfg.optim.lr, cfg.optim.max_grad_norm) == (7, 0.2, None)
    assert cfg.distill.layers == [0, 2]
    assert cfg.data.train.limit == 5
    assert cfg.data.train.path == "demo:train.jsonl"
    assert cfg.data.chat_template_kwargs == {"enable_thinking": False}
    assert (cfg.eval.sets["val"].every, cfg.eval.sets["val"].path) == (3, "demo:val.jsonl")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--optim.lrr=1", "unknown option 'optim.lrr'; did you mean 'optim.lr'"),
        ("--temperatur=1", "did you mean"),
        ("--rollout.engin=auto", "did you mean 'rollout.engine'"),  # no abbreviation
        ("--distill.kind=l2", "distill.kind"),
        ("--steps=many", "steps"),
        ("--eval.sets={x: {every: 3}}", "path"),
    ],
)
def test_mistakes_on_the_command_line(capsys, argument, message):
    assert message in fails(capsys, argument)


def test_unknown_key_in_a_file(capsys, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("rollout: {max_new_token: 3}\n")
    error = fails(capsys, "--config", str(file))
    assert "unknown option 'rollout.max_new_token'; did you mean 'rollout.max_new_tokens'" in error


def test_all_wrong_values_are_listed_at_once(capsys):
    error = fails(
        capsys,
        *("--dry_run", "--steps=0", "--optim.lr=-1", "--rollout.temperature=0"),
        *(
            "--eval.samples=4",
            "--optim.warmup_ratio=2",
            "--rollout.top_p=0",
            "--checkpoint.every=-1",
        ),
    )
    for name in (
        *("steps", "optim.lr", "rollout.temperature", "eval.samples", "optim.warmup_ratio"),
        *("rollout.top_p", "checkpoint.every"),
    ):
        assert name in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distill.layers=[4]"], "block 4, but the student has 4 layers"),
        (["--data.max_prompt_tokens=62"], "exceed the 64 positions of the student"),
        (["--data.max_prompt_tokens=7"], "all 6400 prompts of demo:train.jsonl are longer"),
        (["--config=demo", "--data.train.path=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--config=demo", "--student.path=/nowhere"], "no model at '/nowhere'"),
        (["--student.gradient_checkpointing=-1"], "a number of blocks from 0, got -1"),
        (["--device=cuda:0"], "torch sees no GPU"),
        (["--device=gpu"], "unknown"),
    ],
)
def test_a_run_that_cannot_finish_does_not_start(capsys, arguments, message):
    assert message in fails(capsys, "--dry_run", *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: 3\noptim:\n  lr: [1e-3\nseed: 1\n", ":4:5: not YAML: expected ',' or ']', but"),
        (b"steps: 3\n\tseed: 1\n", ":2:1: not YAML: found character '\\t'"),
        (b"name: \xff\n", " can't be read: 'utf-8' codec can't decode byte 0xff in position 6"),
        (b"- steps\n", ": expected options, one `name: value` a line, but it begins '- steps'"),
        (b"# nothing\n", "a line, but it is empty"),
    ],
)
def test_a_configuration_that_is_none_says_where(capsys, tmp_path, content, message):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    for arguments in (["--config", str(file)], [f"--config={file}", "--dry_run"]):
        error = fails(capsys, *arguments)
        assert error.startswith(f"oprd-train: error: {file}")
        assert message in error


def test_a_directory_below_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    error = fails(capsys, "--dry_run", f"--output_dir={tmp_path / 'file' / 'run'}")
    assert "file is a file, not a directory" in error


def test_a_directory_with_something_in_it_is_refused(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert "already holds another run" in fails(capsys, f"--output_dir={tmp_path}")
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in fails(capsys, f"--output_dir={file}")


def test_dry_run_of_the_demo_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["--dry_run"])
    out = capsys.readouterr().out
    assert "0<-0, 1<-1, 2<-2, 3<-3" in out
    assert "prompts train: 6400" in out
    assert "everything checked: the run can start" in out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_papers_recipe_says_what_it_could_not_check(capsys):
    cli.main(["--dry_run", "--config", str(RECIPES / "r1_distill_1.5b_justrl.yaml")])
    out = capsys.readouterr().out
    assert "not checked: no model at 'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B'" in out
    assert "as far as it could be checked" in out


def test_the_papers_recipe_has_the_papers_values():
    cfg = asdict(parse("--config", str(RECIPES / "r1_distill_1.5b_justrl.yaml")))
    expected = {
        "steps": 500,
        "micro_batch_tokens": 32768,
        "fsdp.param_dtype": "bfloat16",
        "rollout.engine": "vllm",
        "data.max_prompt_tokens": 2048,
        "rollout.prompts_per_step": 8,
        "rollout.responses_per_prompt": 2,
        "rollout.temperature": 1.0,
        "rollout.max_new_tokens": 16384,
        "distill.kind": "mse",
        "distill.layers": "all",
        "distill.positions": "last_k",
        "distill.k": 2000,
        "distill.shift": "after",
        "optim.lr": 1e-5,
        "optim.betas": (0.9, 0.999),
        "optim.weight_decay": 0.01,
        "optim.warmup_ratio": 0.03,
        "optim.schedule": "cosine",
        "optim.max_grad_norm": None,
        "eval.samples": 16,
        "eval.temperature": 0.7,
        "eval.top_p": 0.95,
        "eval.max_new_tokens": 31744,
        "eval.grader": "math",
    }
    for name, value in expected.items():
        found = cfg
        for part in name.split("."):
            found = found[part]
        assert found == value, name
    assert list(cfg["eval"]["sets"]) == ["AIME24", "AIME25", "AIMO"]
    suffix = "Please reason step by step, and put your final answer within \\boxed{}."
    assert json.dumps(cfg["data"]["prompt_suffix"]) == json.dumps(suffix)


TWO_STAGES = RECIPES / "qwen3_1.7b_qwen3_4b_two_stages.yaml"


def test_the_papers_two_stages_are_its_bridge_and_opd_from_there():
    parser = cli.make_parser()
    parsed = parser.parse_args(["--config", str(TWO_STAGES)])
    plain = {k: v for k, v in parsed.as_dict().items() if k not in cli.CONTROLS}
    first, second = map(from_values, stage_values(plain, parsed.stages).values())
    alone = parse("--config", str(RECIPES / "qwen3_1.7b_qwen3_4b_bridge.yaml"))
    assert (first.objectives, second.objectives) == ({"oprd": 1.0}, {"opd_top1": 1.0})
    assert (second.bridge.path, second.steps, second.optim.lr) == (None, 500, 1e-5)
    assert second.student.path == f"{first.output_dir}/student"
    assert (first.eval.teacher, second.eval.teacher) == (True, False)
    for cfg in (first, second):  # what is alike in all three runs
        cfg.name, cfg.output_dir, cfg.student.path = alone.name, None, alone.student.path
        cfg.bridge, cfg.objectives = alone.bridge, alone.objectives
        cfg.eval.teacher = True
        assert cfg == alone


def test_dry_run_of_the_papers_two_stages(capsys, tmp_path, monkeypatch):
    """As it is, and on the demo's models and prompts, since the hub is out of reach."""
    monkeypatch.chdir(tmp_path)
    cli.main(["--config", str(TWO_STAGES), "--dry_run"])
    said = capsys.readouterr().out
    assert "not checked: bridge: the bridge qwen3_1.7b_qwen3_4b.safetensors" in said
    assert "not checked: opd: no model at 'Qwen/Qwen3-1.7B-Base'" in said
    demo = [
        *("--config", str(TWO_STAGES), "--dry_run", "--student.path=demo:student"),
        *("--teacher.path=demo:teacher", "--data.train.path=demo:train.jsonl", "--eval.sets={}"),
        *("--data.chat_template=never", "--data.prompt_suffix=", "--data.max_prompt_tokens=8"),
        *("--rollout.max_new_tokens=5", "--rollout.engine=generate"),
    ]
    model, pairs = ModelInfo(128, 4), [(i, i) for i in range(4)]
    info = BridgeInfo(model, model, pairs, rank=8, solver="ridge")
    of_shapes = ({i: torch.zeros(shape) for i in range(4)} for shape in ((8, 128), (8, 128), 128))
    save_bridge(Bridge(*of_shapes, info), "qwen3_1.7b_qwen3_4b.safetensors")
    cli.main(demo)
    assert "the stages bridge, opd can start" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["qwen3_1.7b_qwen3_4b.safetensors"]
