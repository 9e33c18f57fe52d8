"""Sampling with Hugging Face models alone: `generate` beside continuous batching.

    python -m benchmarks.rollout_engines
    python -m benchmarks.rollout_engines --model ./SmolLM2-135M --responses 64 --places 16
    python -m benchmarks.rollout_engines --small

All engines in one process, in turns. Responses end after L tokens, L uniform over ``--lengths``:
the probability of EOS is set to what makes it so, in every forward pass of the model, whichever
engine makes it. Printed for each engine, medians of ``--rounds``:

    tokens/s   tokens of the responses, without padding, per second
    passes     forward passes
    computed   tokens that went through the model, padding and rows that had ended included, per
               token that was needed (prompts and responses)
    memory     peak above what was in use before

``generate_batch`` is transformers' own continuous batching, over a paged cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig

from oprd.config import SamplingParams
from oprd.data.rollout import Rollout
from oprd.demo.task import make_tokenizer
from oprd.engines.continuous import ContinuousEngine
from oprd.engines.generate import GenerateEngine
from oprd.observability.memory import PeakMemory

EOS = 2
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
    },
    "cpu": {
        "hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1024,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 16_384,
    },
    "cuda": {  # Qwen2 in the paper
        "hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936,
    },
}  # fmt: skip
Sample = Callable[[list[list[int]]], list[Rollout]]


@dataclass
class Passes:
    """What went through a model."""

    count: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Row:
    """Of an engine: medians over rounds."""

    engine: str
    tokens_per_s: float
    passes: float
    computed: float
    mib: float | None
    seconds: list[float]


@contextmanager
def uneven(model: PreTrainedModel, prompt: int, shortest: int, longest: int) -> Iterator[Passes]:
    """Let responses to prompts of ``prompt`` tokens end after shortest..longest tokens, each as
    likely, and count what goes through the model."""
    passes = Passes()

    def set_eos(module: Any, args: Any, given: dict[str, Any], output: Any) -> None:
        passes.count += 1
        passes.tokens += given["input_ids"].numel()
        position, last = given["position_ids"], given.get("logits_to_keep", 0)
        position = position[:, last] if isinstance(last, torch.Tensor) else position[:, -last:]
        drawn = position - prompt + 2  # the number of the token that these logits are for
        hazard = 1 / (longest - drawn + 1).clamp(min=1)
        hazard = torch.where(drawn < shortest, 0.0, hazard.double()).clamp(1e-30, 1 - 1e-7)
        logits = output.logits
        logits[..., EOS] = -torch.inf
        rest = logits.float().logsumexp(-1)
        logits[..., EOS] = (rest + (hazard / (1 - hazard)).log()).to(logits.dtype)

    handle = model.register_forward_hook(set_eos, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def generate_batch(model: PreTrainedModel, most: int, prompt: int, places: int) -> Sample:
    """Return transformers' own continuous batching, as an engine."""
    names = ContinuousBatchingConfig.__dataclass_fields__
    page = "page_size" if "page_size" in names else "block_size"  # transformers 5.16
    blocks = places * (-(-(prompt + most) // 256) + 1)
    options: dict[str, Any] = {page: 256, "num_blocks": blocks, "max_batch_tokens": 8 * 256}
    config = ContinuousBatchingConfig(max_requests_per_batch=places, **options)
    sampling = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=most, eos_token_id=EOS, pad_token_id=0
    )

    def sample(prompts: list[list[int]]) -> list[Rollout]:
        found = model.generate_batch(
            prompts, generation_config=sampling, continuous_batching_config=config
        )
        if len(found) < len(prompts) or any(r.error for r in found.values()):
            raise RuntimeError(next((r.error for r in found.values()), "no response"))
        new = (r.generated_tokens for r in found.values())
        return [Rollout(p, n, n[-1] != EOS) for p, n in zip(prompts, new, strict=True)]

    return sample


def engines(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Sample]:
    """Return the engines by name."""
    tokenizer, most = make_tokenizer(), max(args.lengths)
    model.generation_config.eos_token_id = EOS
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(EOS)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    sampling, places = SamplingParams(most), args.places
    made: dict[str, Sample] = {}
    for cls, kind in ((GenerateEngine, "generate"), (ContinuousEngine, "continuous")):
        for size, how in ((None, "all at once"), (places, f"{places} at once")):
            engine = cls(model, tokenizer, size)
            made[f"{kind}, {how}"] = lambda p, e=engine: e.sample(p, sampling)  # type: ignore[misc]
    if args.generate_batch:
        sample = generate_batch(model, most, args.prompt, places)
        made[f"generate_batch, {places} at once"] = sample
    return made


def measure(model: PreTrainedModel, args: argparse.Namespace) -> Iterator[Row]:
    """Run every engine once a round. One that fails is left out, with a message."""
    generator = torch.Generator().manual_seed(0)
    size = (args.responses, args.prompt)
    prompts = torch.randint(3, model.config.vocab_size, size, generator=generator).tolist()
    shortest, longest = args.lengths
    runs = engines(model, args)
    runs[next(iter(runs))](prompts[:1])  # what only the first passes need is not to be measured
    found: dict[str, list[tuple[float, float, int, float, int | None]]] = {n: [] for n in runs}
    for turn in range(args.rounds):
        for name in list(runs):
            torch.manual_seed(turn)
            counted = uneven(model, args.prompt, shortest, longest)
            with counted as passes, PeakMemory(model.device) as peak:
                start = time.perf_counter()
                try:
                    rollouts = runs[name](prompts)
                except (RuntimeError, ValueError) as error:
                    print(f"{name}: {type(error).__name__}: {error}"[:200], flush=True)
                    del runs[name], found[name]
                    continue
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            new = [len(r.response_ids) for r in rollouts]
            assert shortest <= min(new) <= max(new) <= longest
            needed = sum(new) - len(new) + len(new) * args.prompt  # the last is not read
            row = (seconds, sum(new) / seconds, passes.count, passes.tokens / needed, peak.delta)
            found[name].append(row)
            print(f"round {turn + 1}/{args.rounds}, {name}: {seconds:.1f} s", file=sys.stderr)
    for name, rows in found.items():
        seconds_, rates, counts, shares, peaks = zip(*rows, strict=True)
        mib = [p / 2**20 for p in peaks if p is not None]
        middle = [statistics.median(x) for x in (rates, counts, shares)]
        yield Row(name, *middle, statistics.median(mib) if mib else None, list(seconds_))


def load(args: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    shape = SHAPES["tiny" if args.small else device.type]
    config = Qwen2Config(**shape, max_position_embeddings=4096, tie_word_embeddings=True)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a local model or hub name; default: random weights")
    parser.add_argument("--responses", type=int, help="default: 64, on a GPU 256")
    parser.add_argument("--places", type=int, help="sequences at once; default: a quarter")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--lengths", type=int, nargs=2, help="of responses; default: 16 512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", help="default: float32, on a GPU bfloat16")
    parser.add_argument("--device", help="default: the GPU, if there is one")
    parser.add_argument(
        "--generate_batch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure transformers' own continuous batching too",
    )
    parser.add_argument("--small", action="store_true", help="sizes for a trial of the script")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default = 12 if args.small else 256 if device.type == "cuda" else 64
    args.responses = args.responses or default
    args.places = args.places or max(args.responses // 4, 1)
    args.lengths = args.lengths or ([2, 24] if args.small else [16, 512])
    transformers.logging.set_verbosity_error()
    model = load(args, device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    what = args.model or f"random weights, {millions:,.0f} M"
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    print(
        f"{what}, {str(model.dtype).removeprefix('torch.')}, on {name}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {torch.get_num_threads()} threads\n"
        f"{args.responses} responses of {args.lengths[0]} to {args.lengths[1]} tokens, prompts of "
        f"{args.prompt}; medians of {args.rounds}\n"
    )
    rows = list(measure(model, args))
    print(f"{'engine':<30}{'tokens/s':>10}{'passes':>9}{'computed':>10}{'memory':>12}")
    for row in rows:
        memory = "" if row.mib is None else f"{row.mib:,.0f} MiB"
        print(
            f"{row.engine:<30}{row.tokens_per_s:>10,.0f}{row.passes:>9,.0f}"
            f"{row.computed:>9.2f}x{memory:>12}"
        )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        document = {"settings": settings, "device": name, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
