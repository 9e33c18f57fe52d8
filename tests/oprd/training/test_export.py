"""``oprd-export``."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from oprd.checkpoint import export, files, save_student, state
from oprd.checkpoint.run import model_files
from oprd.checkpoint.writer import Writer
from oprd.cli import export as export_cli
from oprd.config import LoraConfig, StudentConfig
from oprd.demo.task import make_tokenizer
from oprd.models.loading import load_model
from oprd.models.lora import add_adapter
from oprd.training.trainer import train
from tests.oprd.training.test_trainer import small_run
from tests.support.tiny import VOCAB, make_batch, make_model


def run_with_checkpoints(directory, model, *steps):
    tokenizer = make_tokenizer()
    writer = Writer(
        directory / "checkpoints", torch.device("cpu"), asynchronous=False, keep_last=None,
        model_files=model_files(model, tokenizer),
    )  # fmt: skip
    for step in steps:
        writer.write(state.model_tensors(model), {"step": step, "best": None})
        writer.wait()
    return tokenizer


@pytest.mark.parametrize("architecture", ["llama", "smollm", "gemma3", "gpt2", "phi3"])
def test_the_exported_model_is_the_trained_one(tmp_path, architecture, capsys):
    model = make_model(architecture, seed=3).eval()
    model.generation_config.max_new_tokens = 17
    tokenizer = run_with_checkpoints(tmp_path, model, 1)
    export_cli.main([str(tmp_path), str(tmp_path / "out")])
    assert f"step 1: {tmp_path / 'out'}" in capsys.readouterr().out
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids, mask, _ = make_batch()
    logits = [m.eval()(ids, attention_mask=mask).logits for m in (model, other)]
    assert torch.equal(*logits)
    assert other.generation_config.max_new_tokens == 17
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    save_student(model, tokenizer, tmp_path / "student")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "student"))
    assert ours.keys() == theirs.keys()


def test_in_another_precision(tmp_path):
    model = make_model("llama")
    run_with_checkpoints(tmp_path, model, 1)
    export_cli.main([str(tmp_path), str(tmp_path / "out"), "--dtype", "bfloat16"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight.bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_newest_of_a_run_or_the_one_that_is_named(tmp_path, capsys):
    run_with_checkpoints(tmp_path, make_model("llama"), 1, 2)
    (tmp_path / "checkpoints" / files.step_name(2) / ".metadata").write_bytes(b"")
    export_cli.main([str(tmp_path), str(tmp_path / "a")])
    printed = capsys.readouterr().out
    assert "not whole and left out: .metadata has 0 bytes" in printed
    assert "step 1: " in printed
    export_cli.main([str(tmp_path / "checkpoints" / files.step_name(1)), str(tmp_path / "b")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nowhere", "{run}/out"], "no whole checkpoint at"),
        (["{run}", "{run}"], "exists and would be lost"),
        (["{run}", f"{__file__}/out"], "is a file, not a directory"),
        (["{run}", "{run}/out", "--best"], "keeps no best checkpoint"),
        (["{run}", "{run}/out", "--dtype", "int8"], "invalid choice"),
        (["{run}"], "required: output"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    run_with_checkpoints(tmp_path, make_model("llama"), 1)
    with pytest.raises(SystemExit) as ended:
        export_cli.main([a.format(run=tmp_path) for a in arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_lora_student_is_merged(tmp_path, dtype):
    pytest.importorskip("peft")
    cfg = small_run(tmp_path / "run", steps=2, eval__sets={}, checkpoint__every=2)
    cfg.student.lora = LoraConfig(rank=2)
    train(cfg)
    arguments = [str(tmp_path / "run"), str(tmp_path / "out")]
    export_cli.main(arguments if dtype is None else [*arguments, "--dtype", dtype])
    exported = load_file(tmp_path / "out" / "model.safetensors")
    trained = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert exported.keys() == trained.keys()
    for name, weight in trained.items():
        assert torch.equal(exported[name], weight if dtype is None else weight.bfloat16())
    assert (tmp_path / "out" / "adapter").exists() == (dtype is None)
    start = load_model(StudentConfig()).state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in trained.items())


def test_experts_are_merged_too():
    """Their names in files are others than the model's own."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=48, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    add_adapter(model, LoraConfig(4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".experts." in name:
            torch.nn.init.normal_(parameter)
    ids, attention, _ = make_batch()
    with torch.no_grad():
        expected, found = (m(ids, attention).logits for m in (model, export.merged(model).eval()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
