"""What is planned for a run is what a step of it holds, on one rank and on two."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from oprd.benchmark.report import PAPER_SHAPE
from oprd.cli import train as cli
from oprd.config import EvalSetConfig, LoraConfig, StudentConfig, TrainConfig
from oprd.config.demo import demo_config
from oprd.config.fsdp import FsdpConfig
from oprd.memory_plan.advice import advice
from oprd.memory_plan.run import EVALUATION, ROLLOUT, UPDATE, adapter_parameters, make_training_plan
from oprd.memory_plan.shapes import Shape
from oprd.observability.memory import GIB
from tests.oprd.models.test_lora import with_adapter
from tests.oprd.training.test_trainer import ROOT
from tests.support.plan_on_ranks import cases

SHAPE = (
    "{d: 1536, layers: 28, heads: 12, kv_heads: 2, head_dim: 128, intermediate: 8960, "
    "vocab: 151936, tied: false}"
)
RECIPE = ROOT / "recipes" / "r1_distill_1.5b_justrl.yaml"


ALWAYS = ("oprd", "full", "lora", "bfloat16", "mixed", "bridge")


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """By number of ranks and case, those that are asked for."""
    directory = tmp_path_factory.mktemp("plans")
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    asked = {
        item.callspec.id
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    found = {}
    for ranks, how in {1: [], 2: [*launcher, "--nproc-per-node=2"]}.items():
        wanted = [case for case in cases(ranks) if f"{ranks}-{case}" in asked]
        ran = subprocess.run(
            [sys.executable, *how, "-m", "tests.support.plan_on_ranks", str(directory / str(ranks)),
             *wanted], capture_output=True, text=True, cwd=ROOT, timeout=900,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-3000:]
        for case in wanted:
            file = directory / str(ranks) / f"{case}.json"
            found[ranks, case] = json.loads(file.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        pytest.param(r, case, marks=() if case in ALWAYS else pytest.mark.exhaustive)
        for r in (1, 2)
        for case in cases(r)
    ],
)
def test_a_step_holds_what_is_planned(measured, ranks, case):
    found = measured[ranks, case]
    resident = sum(found["planned resident"].values()) - found["planned resident"]["gradients"]
    assert resident == pytest.approx(found["resident"], rel=0.01)
    assert found["planned"] == pytest.approx(found["resident"] + found["peak"], rel=0.1), found
    assert found["planned to sample"] == pytest.approx(found["sampled"], rel=0.1) or case != "oprd"


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_are_counted(targets):
    model = with_adapter("qwen2", target_modules=targets)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = adapter_parameters(Shape.of(model.config), LoraConfig(4, target_modules=targets))
    assert counted == trained


def recipe(**student) -> TrainConfig:
    options = {"dtype": "float32", "gradient_checkpointing": True} | student
    cfg = replace(demo_config(), student=StudentConfig(**options))
    cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens = 1024, 7168
    cfg.eval.sets, cfg.micro_batch_tokens = {}, 32768
    cfg.logging.teacher_head = False
    return cfg


def plan(cfg, gpus=8, memory=80):
    return make_training_plan(cfg, PAPER_SHAPE, {"": PAPER_SHAPE}, gpus, memory * GIB)


def test_what_sharding_precision_and_adapters_save():
    whole, sharded = plan(recipe(), gpus=1), plan(recipe(), gpus=8)
    keys = ("student's weights", "gradients", "AdamW's moments", "teacher's weights")
    for key in keys:
        assert sharded.resident[key] == pytest.approx(whole.resident[key] / 8, rel=1e-6)
    assert whole.resident["AdamW's moments"] == 2 * whole.resident["gradients"]
    mixed = recipe()
    mixed.fsdp = FsdpConfig(param_dtype="bfloat16")
    narrow = plan(mixed)
    assert narrow.resident == sharded.resident  # master weights stay float32
    gathered = [p.moments[UPDATE].terms["gathered weights, two blocks"] for p in (narrow, sharded)]
    assert 2 * gathered[0] == gathered[1]
    copies = recipe()
    copies.fsdp = FsdpConfig(shard_size=2)
    assert plan(copies).resident["gradients"] == 4 * sharded.resident["gradients"]
    offloaded = recipe()
    offloaded.fsdp = FsdpConfig(cpu_offload=True, teacher="offloaded")
    assert sum(plan(offloaded).resident.values()) == 0
    adapter = plan(recipe(lora=LoraConfig(16)), gpus=1)
    assert adapter.resident["AdamW's moments"] < whole.resident["AdamW's moments"] / 50
    base = recipe(lora=LoraConfig(16))
    base.teacher.path = "self:base"
    assert "teacher's weights" not in plan(base, gpus=1).resident


def test_an_engine_takes_its_share():
    cfg = recipe()
    cfg.rollout.engine, cfg.rollout.vllm.gpu_memory_utilization = "vllm", 0.5
    assert plan(cfg).moments[ROLLOUT].total == 40 * GIB
    assert "vLLM engine" not in plan(cfg).resident
    cfg.rollout.vllm.sleep = False
    assert plan(cfg).moments[ROLLOUT].total == 0
    assert plan(cfg).resident["vLLM engine"] == 40 * GIB
    cfg.rollout.vllm.own_gpus = True
    assert "vLLM engine" not in plan(cfg).resident
    assert plan(cfg).moments[ROLLOUT].total == 0


def test_advice_is_followed_by_a_run_that_fits():
    def fits(cfg, memory, gpus=8):
        return plan(cfg, gpus, memory).total <= memory * GIB

    cfg = recipe()
    assert not fits(cfg, 12)
    said = advice(cfg, PAPER_SHAPE, {"": PAPER_SHAPE}, 8, 12 * GIB)
    assert said.startswith("lower micro_batch_tokens to ")
    cfg.micro_batch_tokens = int(said.rsplit(" ", 1)[1])
    assert fits(cfg, 12)
    cfg.micro_batch_tokens += 1024
    assert not fits(cfg, 12)

    cfg = recipe()
    cfg.student.gradient_checkpointing = False
    said = advice(cfg, PAPER_SHAPE, {"": PAPER_SHAPE}, 8, 60 * GIB)
    assert (fits(cfg, 60), said) == (False, "set student.gradient_checkpointing to true or auto")

    cfg = recipe()
    cfg.rollout.prompts_per_step = 8 * 4096
    assert plan(cfg).worst == ROLLOUT
    said = advice(cfg, PAPER_SHAPE, {"": PAPER_SHAPE}, 8, 80 * GIB)
    assert said.startswith("lower rollout.batch_size to ")
    cfg.rollout.batch_size = int(said.rsplit(" ", 1)[1])
    assert fits(cfg, 80)

    cfg = recipe()
    cfg.rollout.engine, cfg.rollout.vllm.gpu_memory_utilization = "vllm", 0.95
    assert not fits(cfg, 40)
    said = advice(cfg, PAPER_SHAPE, {"": PAPER_SHAPE}, 8, 40 * GIB)
    assert said.startswith("lower rollout.vllm.gpu_memory_utilization to ")
    cfg.rollout.vllm.gpu_memory_utilization = float(said.rsplit(" ", 1)[1])
    assert fits(cfg, 40)

    said = advice(recipe(), PAPER_SHAPE, {"": PAPER_SHAPE}, 1, 16 * GIB)
    assert "weights and optimizer alone take" in said
    assert "student.lora.rank" in said


QWEN3 = (
    "{d: 2048, layers: 28, heads: 16, kv_heads: 8, head_dim: 128, intermediate: 6144, "
    "vocab: 151936, tied: true}"
)
QWEN3_4B = (
    "{d: 2560, layers: 36, heads: 32, kv_heads: 8, head_dim: 128, intermediate: 9728, "
    "vocab: 151936, tied: true}"
)
PHI4_MINI = (
    "{d: 3072, layers: 32, heads: 24, kv_heads: 8, head_dim: 128, intermediate: 8192, "
    "vocab: 200064, tied: true}"
)


def shown(capsys, *arguments):
    """What a plan for eight GPUs of 80 GiB says, and the exit code."""
    code = 0
    try:
        cli.main(["--dry_run", "--plan.gpus=8", "--plan.memory_gib=80", *arguments])
    except SystemExit as ended:
        code = ended.code
    return capsys.readouterr().out, code


@pytest.mark.parametrize(
    ("recipe", "student", "teacher"),
    [
        ("r1_distill_1.5b_justrl", SHAPE, SHAPE),
        ("qwen3_1.7b_qwen3_4b_bridge", QWEN3, QWEN3_4B),
        ("qwen3_1.7b_phi4_mini_bridge", QWEN3, PHI4_MINI),
    ],
)
def test_recipes_fit_eight_gpus(capsys, recipe, student, teacher):
    """Also while their bridges are yet to be fitted."""
    arguments = ["--config", str(ROOT / "recipes" / f"{recipe}.yaml")]
    arguments += [f"--plan.student={student}", f"--plan.teacher={teacher}"]
    text, code = shown(capsys, *arguments)
    assert "GiB on each of 8 GPUs" in text
    assert "fits," in text
    assert f"{EVALUATION}, at its peak: teacher, the last token" in text
    assert ("not checked: the bridge" in text) == ("bridge" in recipe)
    assert code == 0
    text, code = shown(capsys, *arguments, "--plan.memory_gib=35")
    assert "does not fit by" in text
    assert "lower eval.batch_size to " in text
    assert code == 1


@pytest.mark.parametrize(
    ("recipe", "student", "teacher"),
    [
        ("r1_distill_1.5b_justrl", SHAPE, SHAPE),
        ("qwen3_1.7b_qwen3_4b_bridge", QWEN3, QWEN3_4B),
        ("qwen3_1.7b_phi4_mini_bridge", QWEN3, PHI4_MINI),
    ],
)
def test_recipes_are_planned_without_the_hub(capsys, monkeypatch, recipe, student, teacher):
    """In lines of 80 characters."""
    monkeypatch.setenv("COLUMNS", "80")
    config = ["--config", str(ROOT / "recipes" / f"{recipe}.yaml")]
    text, code = shown(capsys, *config)
    given, _ = shown(capsys, *config, f"--plan.student={student}", f"--plan.teacher={teacher}")
    plan, of_given = (out[out.index("GiB on each of 8 GPUs") :] for out in (text, given))
    assert (plan, code) == (of_given, 0)
    assert "its shape is known" in text
    table = plan[: plan.index("GiB at most")]
    assert max(map(len, table.splitlines())) <= 80
    assert table.isascii()
    assert "\nstudent's weights " in table


def test_a_bridges_rank_and_a_larger_teacher_count(capsys):
    bridged = ["--config", str(ROOT / "recipes" / "qwen3_1.7b_qwen3_4b_bridge.yaml")]
    bridged += [f"--plan.student={QWEN3}", f"--plan.teacher={QWEN3_4B}"]
    full, _ = shown(capsys, *bridged)
    narrow, _ = shown(capsys, *bridged, "--bridge.rank=8")
    assert "teacher's outputs" in full
    assert "teacher's outputs" not in narrow  # nothing to speak of
    cfg = recipe()
    cfg.eval.sets = {"test": EvalSetConfig("test.jsonl")}
    larger = replace(PAPER_SHAPE, layers=2 * PAPER_SHAPE.layers)
    of_same, of_larger = (
        make_training_plan(cfg, PAPER_SHAPE, {"": shape}, 8).moments[EVALUATION].terms
        for shape in (PAPER_SHAPE, larger)
    )
    assert of_larger["keys and values"] == 2 * of_same["keys and values"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dry_run", "--plan.gpus=8", "--plan.memory_gib=80", "--student.path=org/unheard_of"],
            "add its shape to the command, as in --plan.student '{d: 1536, layers: 28,",
        ),
        (["--dry_run", "--plan.gpus=3", "--plan.memory_gib=80"], "can't be shared equally by 3"),
        (["--plan.gpus=8", "--plan.memory_gib=80"], "add --dry_run"),
        (["--dry_run", "--plan.gpus=0"], "plan.gpus must be at least 1, got 0"),
        (["--dry_run", "--plan.gpus=8", "--plan.memory_gib=-8"], "memory_gib must be above 0"),
    ],
)
def test_what_is_missing_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--config", str(RECIPE), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_recipe_whose_models_are_here_needs_no_shape(capsys):
    cli.main(["--dry_run", "--plan.gpus=2", "--plan.memory_gib=1"])
    assert "fits," in capsys.readouterr().out


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_teacher_that_runs_ahead_holds_its_outputs_twice(on_gpu):
    def update(**changes):
        cfg = replace(demo_config(), **changes)
        shape = Shape(d=64, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=99,
                      tied=True)  # fmt: skip
        return make_training_plan(cfg, shape, {"": shape}, 1, on_gpu=on_gpu).moments[UPDATE]

    alone, beside = update(), update(overlap=True)
    added = {n: x for n, x in beside.terms.items() if n not in alone.terms}
    assert added["next teacher's outputs"] == alone.terms["teacher's outputs"] > 0
    assert ("next teacher's forward" in added) is on_gpu
    assert beside.total == alone.total + sum(added.values())
