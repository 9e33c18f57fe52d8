"""LoRA students: taps, objectives, a teacher without the adapter, and what is saved."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd import attach
from oprd.config import (
    DistillConfig,
    LoraConfig,
    OpdConfig,
    SamplingParams,
    TeacherConfig,
)
from oprd.config.demo import demo_config
from oprd.data.collate import Batch
from oprd.distill.objectives import REP, Objectives
from oprd.engines.generate import generate
from oprd.errors import ConfigError, need_package
from oprd.models.decoder import find_decoder
from oprd.models.loading import DEMO
from oprd.models.lora import add_adapter, is_adapted, merged_weights
from oprd.models.packing_check import check_packing
from oprd.models.weights import full_weights
from oprd.models.without_adapter import WithoutAdapter, adapter_off
from oprd.training.preflight import preflight
from oprd.training.setup import Builder
from oprd.training.trainer import train
from tests.oprd.distill.test_attach import assert_same, attached, expected, gradients
from tests.oprd.training.test_trainer import ROOT, small_run, steps_of
from tests.support.tiny import make_batch, make_model

peft = pytest.importorskip("peft")
LORA = LoraConfig(rank=4, alpha=8)


def with_adapter(architecture="qwen2", moved=True, **changes):
    """A model with an adapter that does something, unless it is not ``moved``."""
    model = make_model(architecture)
    add_adapter(model, LoraConfig(**(vars(LORA) | changes)))
    if moved:
        torch.manual_seed(7)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0, 0.1)
    return model


def load_student(lora=None):
    cfg = demo_config()
    cfg.student.lora = lora or LoraConfig()
    return Builder(cfg, torch.device("cpu")).student


def logits(model, batch):
    ids, attention, _ = batch
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=attention).logits


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"])
def test_taps_give_the_gradients_of_the_adapter(architecture, checkpointing):
    student, teacher = with_adapter(architecture), make_model(architecture, seed=1)
    batch = make_batch("right")
    student.train()
    wanted = expected(student, teacher, batch, "all", positions="all")
    assert wanted[1]
    assert all(".lora_" in name for name in wanted[1])
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(attached(student, teacher, batch, positions="all"), wanted)


def test_taps_on_a_users_own_peft_model():
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    student = peft.get_peft_model(student, config)
    student.train()
    batch = make_batch("left")
    wanted = expected(student, teacher, batch, "all", positions="all")
    assert len(wanted[1]) == 2 * 2 * 3  # A and B of two layers in three blocks
    assert_same(attached(student, teacher, batch, positions="all"), wanted)


def test_a_users_own_base_as_teacher():
    base, batch = make_model("qwen2"), make_batch()
    plain = make_model("qwen2")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    student = peft.get_peft_model(base, config)
    wanted = expected(student, plain, batch, "all", positions="all")
    assert_same(attached(student, WithoutAdapter(student), batch, positions="all"), wanted)


@pytest.mark.parametrize("layers", ["all", [0]], ids=str)
def test_the_base_teaches_at_no_memory(layers):
    """Its states are those of the model before it was wrapped, and it has no weights of its own."""
    plain, student = load_student(), load_student(LORA)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    storages = {p.untyped_storage().data_ptr() for p in student.parameters()}
    teacher = WithoutAdapter(student)
    assert {p.untyped_storage().data_ptr() for p in teacher.parameters()} == storages
    distiller = attach(student, teacher, layers=layers)
    ids, attention, _ = make_batch()
    ids, rows = ids % 10, torch.arange(5, 20)
    with torch.no_grad():
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        states = plain(
            ids, attention_mask=attention, position_ids=positions, output_hidden_states=True
        ).hidden_states[1:]
        ours = student(
            ids, attention_mask=attention, position_ids=positions, output_hidden_states=True
        ).hidden_states[1:]
    found = distiller.teacher_states(ids, attention, rows)
    for block, state in zip((0, 1, 2, 3), found, strict=False):
        torch.testing.assert_close(state, states[block].flatten(0, 1)[rows])
        assert not torch.allclose(state, ours[block].flatten(0, 1)[rows], atol=1e-2)


def test_only_the_student_is_loaded():
    """Whatever reads the base as a teacher reads the student's own tensors."""
    cfg = replace(demo_config(), teacher=TeacherConfig("self:base"))
    cfg.student.lora = LORA
    builder = Builder(cfg, torch.device("cpu"))
    teacher = builder.whole_teacher("")
    assert isinstance(teacher, WithoutAdapter)
    assert teacher.adapted is builder.student


def test_the_adapter_is_off_only_inside_and_trains_afterwards():
    model, batch = with_adapter(), make_batch()
    plain = make_model("qwen2")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    before = logits(model, batch)
    with adapter_off(model):
        torch.testing.assert_close(logits(model, batch), logits(plain, batch))
        assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    with pytest.raises(ValueError, match="inside"), adapter_off(model):
        raise ValueError("inside")
    assert torch.equal(logits(model, batch), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


def test_the_base_generates_as_the_plain_model():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "student")
    student = load_student(LORA)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.3)
    plain = load_student()
    prompts = tokenizer(["100+200=", "12+345=", "7+8="])["input_ids"]
    own, *others = (
        [r.response_ids for r in generate(m, tokenizer, prompts, SamplingParams(5, temperature=0))]
        for m in (student, plain, WithoutAdapter(student))
    )
    assert others[0] == others[1] != own
    assert student.generation_config.max_new_tokens == plain.generation_config.max_new_tokens


@pytest.mark.parametrize("implementation", ["chunked", "materialised"])
@pytest.mark.parametrize("name", ["opd_top1", "opd_full", REP])
def test_objectives_against_the_base(name, implementation):
    """As against a second model that holds the base's weights."""
    d, opd = DistillConfig(), OpdConfig(implementation=implementation, chunk_tokens=3)
    batch, found = Batch(*make_batch()), []
    for separate in (True, False):
        student = with_adapter("smollm").train()
        teacher = make_model("smollm") if separate else WithoutAdapter(student)
        distillers = {"": attach(student, teacher, positions="all")} if name == REP else {}
        objectives = Objectives({name: 1.0}, student, {"": teacher}, distillers, d, opd)
        chosen = objectives.supervise(batch)
        total = (chosen.rep or chosen.opd).total
        out = objectives.student_pass(
            batch, chosen, objectives.teacher_pass(batch, chosen, ""), {name: total}
        )
        out.loss.backward()
        assert student.training
        found.append((out.loss[None].detach(), gradients(student)))
    assert_same(found[1], found[0])
    assert any(g.abs().max() > 1e-6 for g in found[0][1].values())


@pytest.mark.parametrize("architecture", ["qwen2", "smollm", "gpt2"])
def test_merged_weights_are_the_model(architecture):
    model, batch = with_adapter(architecture), make_batch()
    plain = make_model(architecture, seed=3)
    weights = dict(merged_weights(model))
    assert "base_layer" not in " ".join(weights)
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    tied = plain.config.tie_word_embeddings
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    torch.testing.assert_close(logits(plain, batch), logits(model, batch))
    assert dict(merged_weights(plain)).keys() == weights.keys() == dict(full_weights(model)).keys()


def test_the_adapter_is_float32_and_the_same_on_every_rank():
    found = []
    for noise in (1, 2):
        model = make_model("qwen2").bfloat16()
        torch.manual_seed(noise)
        add_adapter(model, LORA, seed=5)
        adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in adapter.values()} == {torch.float32}
        assert model.lm_head.weight.dtype == torch.bfloat16
        model(torch.ones(1, 4, dtype=torch.long)).logits.float().sum().backward()
        found.append(adapter)
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_training_moves_the_adapter_alone(tmp_path):
    changes = {"student__lora": LoraConfig(16), "eval__sets": {}, "steps": 12}
    cfg = small_run(tmp_path / "run", **changes, optim__lr=1e-2, rollout__prompts_per_step=32)
    summary = train(cfg)
    losses = [s["actor/rep_loss"] for s in steps_of(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    merged = load_file(summary.student / "model.safetensors")
    base = {n: w.float() for n, w in load_file(DEMO / "student" / "model.safetensors").items()}
    assert merged.keys() == base.keys()
    moved = {n for n in base if not torch.equal(merged[n], base[n])}
    assert moved == {n for n in base if "proj" in n and n.endswith("weight")}
    # What PEFT makes of the base and the adapter is what transformers loads.
    alone = AutoModelForCausalLM.from_pretrained(summary.student).eval()
    original = load_student()
    loaded = peft.PeftModel.from_pretrained(original, summary.student / "adapter").eval()
    ids = torch.randint(3, 10, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, alone(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(alone(ids).logits, load_student()(ids).logits)


def test_a_run_against_its_own_base(tmp_path):
    """The first step's teacher is the student itself, told the answer."""
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(100, 140)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    losses = {}
    for path in ("self:start", "self:base", "self:current"):
        cfg = small_run(tmp_path / path, student__lora=LORA, eval__sets={}, optim__lr=1e-2)
        cfg.data.train.path, cfg.data.train.teacher_prompt = str(file), "{answer}={prompt}"
        cfg.data.max_teacher_prompt_tokens = 13
        cfg.teacher.path = path
        train(cfg)
        losses[path] = [s["actor/rep_loss"] for s in steps_of(tmp_path / path)]
    assert losses["self:base"] == pytest.approx(losses["self:start"], rel=1e-4)
    assert losses["self:current"][0] == pytest.approx(losses["self:base"][0], rel=1e-4)
    assert losses["self:current"][2] != pytest.approx(losses["self:base"][2], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__lora": LoraConfig(0)}, "student.lora.rank must be at least 1, got 0"),
        ({"student__lora": LoraConfig(4, dropout=1.0)}, "dropout must lie in"),
        ({"student__lora": LoraConfig(4, target_modules=[])}, "target_modules is empty"),
        ({"student__lora": LoraConfig(alpha=8)}, "alpha given without student.lora.rank"),
        ({"student__lora": LoraConfig(4, target_modules=["q"])}, r"target_modules=\['q'\]"),
        ({"student__lora": LoraConfig(4, target_modules=["lm_head"])}, "outside the decoder"),
        ({"teacher__path": "self:base"}, "student.lora.rank is null"),
        ({"student__lora": LORA, "teacher__path": "self:base"}, "nothing to teach"),
        ({"student__lora": LORA, "distill__init_head_from_teacher": True}, "does not contain"),
    ],
)
def test_what_can_not_work_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        preflight(small_run(tmp_path / "run", **changes))


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"pip install 'oprd\[peft\]'"):
        need_package("no_such_package", "peft", "student.lora")


def test_a_model_without_adapter_is_not_adapted():
    assert not is_adapted(make_model("llama"))
    assert is_adapted(with_adapter("llama", moved=False))


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from oprd import attach
from oprd.models.lora import adapter_weights
from oprd.models.without_adapter import WithoutAdapter
from oprd.models.weights import full_weights
from tests.oprd.models.test_lora import with_adapter
from tests.support.tiny import make_batch
dist.init_process_group("gloo")
student = with_adapter("qwen2").train()
if sys.argv[1] == "bfloat16":
    for p in student.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
for layer in student.model.layers:
    fully_shard(layer)
fully_shard(student)
distiller = attach(student, WithoutAdapter(student))
from torch.distributed.fsdp import register_fsdp_forward_method
student.oprd_forward = distiller.__call__
register_fsdp_forward_method(student, "oprd_forward")
for _ in range(2):
    student.zero_grad()
    loss = student.oprd_forward(*make_batch()).loss
    loss.backward()
found = {n: p.grad.full_tensor() for n, p in student.named_parameters() if p.grad is not None}
result = {"loss": loss.detach(), "gradients": found, "merged": dict(full_weights(student))}
result["adapter"] = adapter_weights(student)
if dist.get_rank() == 0:
    torch.save(result, sys.argv[2])
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # see oprd.distributed.run_main
"""


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_two_sharded_ranks_train_and_merge_as_one(tmp_path, dtype):
    """Frozen and trained weights in one FSDP2 group; its first forward has the adapter off."""
    script, result = tmp_path / "sharded.py", tmp_path / "result.pt"
    script.write_text(SHARDED)
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    ran = subprocess.run(
        [sys.executable, *launcher, "--nproc-per-node=2", str(script), dtype, str(result)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = torch.load(result)
    student = with_adapter("qwen2").train()
    if dtype == "bfloat16":
        for p in student.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
    out = attach(student, WithoutAdapter(student))(*make_batch())
    out.loss.backward()
    torch.testing.assert_close(found["loss"], out.loss.detach())
    own = gradients(student)
    assert found["gradients"].keys() == own.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-5)
    merged = dict(merged_weights(student))
    assert found["merged"].keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(found["merged"][name], weight.detach())
    assert {tuple(t.shape) for t in found["adapter"].values()} >= {(4, 32), (32, 4)}


def test_a_new_adapter_is_in_the_models_mode():
    """Its dropout would make two evaluations differ, and `check_packing` see a leak."""
    model = make_model("qwen2").eval()
    add_adapter(model, LoraConfig(4, dropout=0.5))
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    check_packing(find_decoder(model), "student")


def test_a_student_that_teaches_itself_by_some_layers_stays_in_training():
    model = make_model("qwen2").eval()
    distiller = attach(model, model, layers=[0])
    model.train()
    input_ids, attention_mask, response_mask = make_batch()
    distiller.teacher_states(input_ids, attention_mask, response_mask.flatten().nonzero()[:, 0])
    assert all(module.training for module in model.modules())
