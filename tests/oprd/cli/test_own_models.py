"""A run with models of one's own: the method's defaults, and what is said before it starts."""

import json

import pytest

from oprd.bridge.config import FitConfig
from oprd.cli import bridge as bridge_cli
from oprd.cli import train as cli
from oprd.cli.parser import parse_run
from oprd.config import DataConfig, EvalConfig, LoraConfig, RolloutConfig, TrainConfig
from oprd.config.demo import demo_config, demo_values
from oprd.demo.task import make_tokenizer
from oprd.models.defaults import choose_dtypes, choose_lengths
from oprd.training.preflight import choose_defaults
from tests.support.tiny import make_model

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}="


@pytest.fixture
def own(tmp_path):
    """Options that name two models and prompts, which are not the demo's."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate(("student", "teacher")):
        model = make_model("qwen2", seed, vocab_size=len(tokenizer), max_position_embeddings=64)
        model.generation_config.do_sample = True
        model.generation_config.top_k = 20
        model.generation_config.repetition_penalty = 1.1
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": f"{i}+{i}="} for i in range(64)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        f"--student.path={tmp_path / 'student'}",
        f"--teacher.path={tmp_path / 'teacher'}",
        f"--data.train.path={tmp_path / 'p.jsonl'}",
    ]


def parse(*argv):
    parsed = parse_run(cli.make_parser, argv, demo_values())
    return cli.to_config(cli.make_parser().instantiate(parsed))


def test_the_demo_is_run_without_models(tmp_path):
    assert parse() == parse("--config", "demo") == parse("--config=demo") == demo_config()
    changed = demo_config()
    changed.steps = 3
    assert parse("--steps", "3") == changed
    file = tmp_path / "c.yaml"
    file.write_text("student: {path: demo:student}\nsteps: 3\n")
    assert parse("--config", str(file)) == changed


def test_own_models_have_the_methods_defaults(own):
    expected = TrainConfig()
    expected.student.path, expected.teacher.path, expected.data.train.path = (
        option.partition("=")[2] for option in own
    )
    cfg = parse(*own)
    assert cfg == expected
    assert (cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens) == (2048, 4096)
    assert (cfg.rollout.prompts_per_step, cfg.rollout.responses_per_prompt) == (8, 2)
    assert (cfg.optim.lr, cfg.optim.warmup_ratio, cfg.optim.schedule) == (1e-5, 0.03, "cosine")
    d = cfg.distill
    assert (d.shift, d.positions, d.k, cfg.eval.sets) == ("after", "last_k", 2000, {})
    over_the_demo = parse("--config=demo", *own)
    assert over_the_demo.rollout == demo_config().rollout
    assert over_the_demo.student.path == expected.student.path


def test_a_fit_has_the_same_defaults(own):
    def fit(*argv):
        return parse_run(bridge_cli.make_fit_parser, argv, bridge_cli.demo_fit_values())

    cfg = fit(*own)
    defaults = TrainConfig()
    assert (cfg.positions, cfg.k, cfg.shift) == ("last_k", 2000, "after")
    assert cfg.rollout.max_new_tokens == defaults.rollout.max_new_tokens
    assert FitConfig().data == defaults.data
    demo = fit("--teacher.path=runs/other")
    assert (demo.positions, demo.shift, demo.rollout.max_new_tokens) == ("all", "before", 5)


@pytest.mark.parametrize("missing", range(3))
def test_all_three_are_needed(own, missing, capsys):
    given = own[:missing] + own[missing + 1 :]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*given, "--dry_run"])
    assert stopped.value.code == 2
    name = own[missing].partition("=")[0]
    assert f"Give {name} (" in capsys.readouterr().err


def test_what_a_run_will_do(own, capsys, tmp_path):
    cli.main([*own, f"--output_dir={tmp_path / 'run'}", "--dry_run"])
    model = make_model("qwen2", vocab_size=len(make_tokenizer()))
    number = sum(p.numel() for p in model.parameters())
    shown = capsys.readouterr().out
    for line in (
        "8 prompts x 2 responses, at most 32 new tokens",
        f"student: {number / 1000:.3g} K parameters, 3 layers, 32 wide, float32",
        "objective: oprd (mse)",
        "layers (student<-teacher): 0<-0, 1<-1, 2<-2",
        "positions: last_k, k 2000, shift after, token-mean",
        "prompts train: 64, the longest 6 tokens",
        "optimizer: AdamW, lr 1e-05, warm-up 3%, cosine",
        "device: cpu, 1 rank, products in float32, kernels: ",
        f"output: {tmp_path / 'run'}",
        "data.max_prompt_tokens=32: half of the models' context of 64 tokens",
        "rollout.max_new_tokens=32: what the models' context of 64 tokens leaves",
        "64 prompts are plain text, which the student continues as it stands",
        "asks for top_k=20, repetition_penalty=1.1: sampling follows rollout.* alone",
    ):
        assert line in shown, shown
    assert "eval" not in shown


def test_three_options_train(own, capsys, tmp_path):
    cli.main([*own, f"--output_dir={tmp_path / 'run'}", "--steps=2", "--log_every=1"])
    shown = capsys.readouterr().out
    assert shown.index("objective: oprd (mse)") < shown.index("step 1/2")
    assert (tmp_path / "run/student/config.json").is_file()


@pytest.mark.parametrize(
    ("on_gpu", "lora", "expected"),
    [
        (False, False, ("float32", "float32")),
        (True, False, ("float32", "bfloat16")),
        (True, True, ("bfloat16", "bfloat16")),
    ],
)
def test_dtypes_follow_the_device(on_gpu, lora, expected):
    cfg = TrainConfig()
    if lora:
        cfg.student.lora = LoraConfig(8)
    choose_dtypes(cfg.student, [cfg.teacher], on_gpu)
    assert (cfg.student.dtype, cfg.teacher.dtype) == expected


@pytest.mark.parametrize(
    ("on_gpu", "ranks", "dtype", "expected"),
    [
        (False, 1, "auto", (None, None)),
        (True, 1, "auto", ("bfloat16", None)),
        (True, 8, "auto", (None, "bfloat16")),
        (True, 1, "bfloat16", (None, None)),
    ],
)
def test_a_gpu_multiplies_in_bfloat16(on_gpu, ranks, dtype, expected):
    cfg = TrainConfig()
    cfg.student.dtype = dtype
    choose_defaults(cfg, lambda load: load(), on_gpu, ranks)
    assert (cfg.autocast, cfg.fsdp.param_dtype) == expected


def test_lengths_that_are_given_stay():
    config = make_model("qwen2").config  # 64 positions
    data, rollout, evaluation = DataConfig(), RolloutConfig(max_new_tokens=7), EvalConfig()
    notes = choose_lengths(data, rollout, evaluation, [(config, None), (None, None)])
    assert (data.max_prompt_tokens, rollout.max_new_tokens) == (32, 7)
    assert evaluation.max_new_tokens == 32
    assert len(notes) == 2
    data, rollout = DataConfig(), RolloutConfig()
    assert choose_lengths(data, rollout, None, [(config, 10**6)]) == []
    assert (data.max_prompt_tokens, rollout.max_new_tokens) == (2048, 4096)
