"""FSDP2: however many ranks there are, the same losses and the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oprd.config import SamplingParams
from oprd.config.demo import demo_config
from oprd.config.fsdp import FsdpConfig
from oprd.engines.generate import generate
from oprd.errors import Problems
from oprd.models.compile import compile_layers
from oprd.models.loading import empty_model, load_model, load_tokenizer
from tests.support.bridges import write_teachers
from tests.support.on_ranks import BF16, CASES, write_bridge

ROOT = Path(__file__).parents[3]
UNEVEN = ("oprd", "bridge", "small_batches", "lora", "teachers")
"""What three ranks do otherwise than two: rows and weights do not divide by them."""
RUN = {1: tuple(CASES), 2: tuple(c for c in CASES if c != "hybrid"), 3: UNEVEN, 4: ("hybrid",)}
LOSSES = ("loss", "grad_norm", "cosine_similarity", "student_norm", "teacher_norm")


def run_on(ranks: int, directory: Path) -> None:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    launcher += [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "-m",
        "tests.support.on_ranks",
    ]
    result = subprocess.run(
        [sys.executable, *launcher, str(directory / str(ranks)), *RUN[ranks]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-5000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By number of ranks, where their results are; made when first asked for."""
    directory = tmp_path_factory.mktemp("ranks")
    write_bridge(directory / "bridge.safetensors")
    write_teachers(directory)
    done: set[int] = set()

    def of(ranks: int, case: str) -> dict:
        if ranks not in done:
            run_on(ranks, directory)
            done.add(ranks)
        return torch.load(directory / str(ranks) / f"{case}.pt")

    return of


PAIRS = [
    pytest.param(ranks, case, marks=pytest.mark.exhaustive if ranks == 3 else ())
    for ranks in (2, 3, 4)
    for case in RUN[ranks]
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "case"), PAIRS)
def test_ranks_agree_with_one(results, ranks, case):
    assert_agree(results(1, case), results(ranks, case), case)


def assert_agree(one: dict, many: dict, case: str) -> None:
    """Two results of `on_ranks`."""
    assert one["weights"].keys() == many["weights"].keys()
    # A bfloat16 product of another batch, or added in another order, is rounded otherwise.
    rough = any(name in CASES[case] for name in BF16)
    tolerance = 2e-2 if rough else 2e-5
    for ours, theirs in zip(one["metrics"], many["metrics"], strict=True):
        assert ours["rollout/tokens"] == theirs["rollout/tokens"]
        for name in (n for n in ours if n.endswith(LOSSES)):
            a, b = torch.tensor(ours[name]), torch.tensor(theirs[name])
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"{name} {a} {b}")
    before = load_model(demo_config().student).state_dict()
    moved, apart = distance(one["weights"], before), distance(one["weights"], many["weights"])
    assert apart <= moved * (0.05 if rough else 1e-3)


def distance(a: dict, b: dict) -> float:
    """Euclidean, over all weights."""
    return sum((a[name] - b[name]).double().square().sum().item() for name in a) ** 0.5


@pytest.mark.slow
def test_cases_with_one_meaning_agree(results):
    """What saves memory or time changes nothing."""
    plain = results(1, "oprd")["weights"]
    for case in ("checkpointing", "replicated_teacher", "offloaded", "not_sharded", "small_batches",
                 "overlap", "packed", "compiled"):  # fmt: skip
        for name, weight in results(1, case)["weights"].items():
            torch.testing.assert_close(weight, plain[name], rtol=1e-4, atol=1e-5, msg=case)


def test_a_model_to_be_filled_is_the_model_but_for_its_weights():
    cfg = demo_config().student
    whole, empty = load_model(cfg), empty_model(cfg)
    shapes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (whole, empty)]
    assert shapes[0] == shapes[1]
    assert whole.generation_config.to_dict() == empty.generation_config.to_dict()
    assert not any(t.is_meta for t in (*empty.parameters(), *empty.buffers()))


@pytest.mark.slow
def test_layers_are_compiled_in_training_and_left_alone_in_generate():
    from torch._dynamo.utils import counters

    model = load_model(demo_config().student)
    compile_layers(model)
    counters.clear()
    ids = torch.tensor([[5, 6, 7]])
    tokenizer = load_tokenizer("demo:student")
    generate(model, tokenizer, ids.tolist(), SamplingParams(3, temperature=0.0))
    assert counters["stats"]["unique_graphs"] == 0
    with torch.no_grad():
        compiled = model(ids, use_cache=False).logits
    assert counters["stats"]["unique_graphs"] == 1  # one serves every layer
    torch.testing.assert_close(compiled, load_model(demo_config().student)(ids).logits)


@pytest.mark.parametrize(
    ("fsdp", "ranks", "message"),
    [
        (FsdpConfig(param_dtype="bfloat16"), 1, "fsdp.param_dtype is asked for, but FSDP is off"),
        (FsdpConfig(mode="never", cpu_offload=True), 2, "fsdp.cpu_offload is asked for"),
        (FsdpConfig(shard_size=3), 4, "shard_size=3 does not divide the 4 ranks"),
        (FsdpConfig(teacher="offloaded"), 1, "fsdp.teacher=offloaded is asked for"),
    ],
)
def test_what_cannot_be_sharded_is_refused(fsdp, ranks, message):
    problems = Problems()
    fsdp.check(problems, None, ranks, own_teacher=True)
    assert message in "".join(problems.found)


def test_two_ways_to_mix_precisions_are_refused():
    problems = Problems()
    FsdpConfig(param_dtype="bfloat16").check(problems, "bfloat16", 2, own_teacher=False)
    assert "choose one" in "".join(problems.found)
