"""Teachers of another shape than the demo's student, and fits and runs with them."""

import json
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from oprd.bridge.config import FitConfig
from oprd.bridge.fit import fit
from oprd.config import BridgeConfig, PromptsConfig, TeacherConfig, TrainConfig
from oprd.config.demo import demo_config
from oprd.demo.bridge_teacher import make_olmo, make_pair_tokenizer
from oprd.demo.task import make_splits, make_tokenizer
from tests.support.runs import set_options, small_run


def write_teacher(directory) -> str:
    """Six layers, 48 wide, random weights, the demo's tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.06,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def demo_fit(file, teacher, **options) -> FitConfig:
    """Of the demo's student, with the demo's options."""
    demo = demo_config()
    cfg = FitConfig(
        output=str(file), student=demo.student, data=demo.data, rollout=demo.rollout,
        positions=demo.distill.positions, shift=demo.distill.shift, **options,
    )  # fmt: skip
    cfg.teacher.path = teacher
    return cfg


def small_fit(file, teacher, **changes) -> FitConfig:
    return set_options(demo_fit(file, teacher, prompts=60, rank=8, ridge=1e-4), changes)


def bridged_run(directory, teacher, bridge_file, **changes) -> TrainConfig:
    changes = {"teacher__path": teacher, "bridge__path": str(bridge_file)} | changes
    return small_run(directory, **changes)


def write_teachers(directory: Path) -> None:
    """Of prompts in turn: the demo's teacher, and one of another shape and tokenizer; and a bridge
    from each."""
    torch.manual_seed(3)
    other, tokenizer = str(directory / "other"), make_pair_tokenizer()
    make_olmo(tokenizer, width=64, layers=6).save_pretrained(other)
    tokenizer.save_pretrained(other)
    rows = [json.dumps({"prompt": s.prompt, "answer": s.answer}) for s in make_splits().train[:40]]
    for i, (name, path) in enumerate({"same": "demo:teacher", "other": other}.items()):
        cfg = demo_fit(directory / f"{name}.safetensors", path, rank=4, prompts=60)
        cfg.data.train.limit = 60
        fit(cfg)
        (directory / f"{name}.jsonl").write_text("\n".join(rows[i::2]))


def add_teachers(cfg: TrainConfig, directory: Path, rank: int | None = None) -> None:
    """Those of `write_teachers`."""
    for name, path in {"same": "demo:teacher", "other": str(directory / "other")}.items():
        cfg.teachers[name] = TeacherConfig(path)
        cfg.data.sources[name] = PromptsConfig(str(directory / f"{name}.jsonl"))
        cfg.bridges[name] = BridgeConfig(str(directory / f"{name}.safetensors"), rank)
