"""`examples/verl_recipe`: its loss against plain autograd, and verl's actor update on a CPU.

The latter needs verl, and is skipped where it is missing: see the recipe's README.
"""

import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import oprd
from oprd.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "verl_recipe"
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "architectures": ["Qwen2ForCausalLM"],
}
# Of each sequence: its length, its response's, and which of the response's tokens were written.
SEQUENCES = [(8, 5, [1, 1, 1, 1, 1]), (3, 2, [1, 1]), (7, 5, [1, 0, 0, 1, 1]), (4, 1, [1])]
LENGTHS = [length for length, _, _ in SEQUENCES]
PLACES = torch.cat([torch.arange(length) for length in LENGTHS])
PROMPT = 3  # tokens, of the longest


def tiny(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = Qwen2Config(**SIZES, attn_implementation="eager")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture
def rep_step(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    spec = importlib.util.spec_from_file_location("rep_step", RECIPE / "rep_step.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rep_step", module)
    spec.loader.exec_module(module)
    return module


def plain(student, teacher, sequences: Iterable[tuple[Tensor, Tensor]], shift: int = 0) -> Tensor:
    """The mean of Eq. 6 over all written tokens of the sequences, one sequence at a time."""
    total, count = torch.zeros(()), 0
    for ids, written in sequences:
        ours = student(ids[None], output_hidden_states=True).hidden_states[1:]
        with torch.no_grad():
            theirs = teacher(ids[None], output_hidden_states=True).hidden_states[1:]
        rows = written.nonzero().squeeze(1) - shift
        for a, b in zip(ours, theirs, strict=True):
            total = total + (a[0, rows] - b[0, rows]).square().mean(-1).sum() / len(ours)
        count += len(rows)
    return total / count


def gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-6), name


def batch(some: slice = slice(0, 4), padded: bool = False) -> dict[str, Tensor]:
    """Some of the sequences as verl has them, without prompts' tokens: only the shapes count."""
    responses = [torch.ones(response, dtype=torch.long) for _, response, _ in SEQUENCES[some]]
    masks = [torch.tensor(mask) for _, _, mask in SEQUENCES[some]]
    ids = jagged([torch.ones(length, dtype=torch.long) for length, _, _ in SEQUENCES[some]])
    if not padded:
        return {"input_ids": ids, "responses": jagged(responses), "response_mask": jagged(masks)}
    attention = torch.ones(len(masks), PROMPT + 5, dtype=torch.long)
    for row, (length, response, _) in zip(attention, SEQUENCES[some], strict=True):
        row[: PROMPT - (length - response)] = 0
        row[PROMPT + response :] = 0
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "responses": pad_sequence(responses, batch_first=True),
        "response_mask": pad_sequence(masks, batch_first=True),
    }


def jagged(parts: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize("padded", [False, True])
def test_written_tokens(rep_step, padded):
    by_hand = [0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1]
    assert rep_step.written_tokens(batch(padded=padded)).int().tolist() == by_hand


def micro_batch(rep_step, ids: Tensor, some: slice, packed: bool) -> dict[str, Tensor | None]:
    """The inputs of some of the sequences, as verl hands them to the student."""
    sequences = ids.split(LENGTHS)[some]
    places = [torch.arange(len(s)) for s in sequences]
    if packed:  # with two tokens of padding, as verl's pad_to_length has them
        sequences, places = [*sequences, torch.zeros(2).long()], [*places, torch.arange(2)]
        inputs = {"input_ids": torch.cat(sequences)[None], "position_ids": torch.cat(places)[None]}
        inputs["attention_mask"] = None
    else:
        ones = [torch.ones_like(s, dtype=torch.int32) for s in sequences]
        padded = [pad_sequence(x, batch_first=True) for x in (sequences, places, ones)]
        inputs = dict(zip(("input_ids", "position_ids", "attention_mask"), padded, strict=True))
    return rep_step.distiller_inputs(inputs, rep_step.written_tokens(batch(some)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("parts", [[slice(0, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]])
def test_the_update_is_that_of_plain_autograd(rep_step, packed, parts):
    """However it is split into micro-batches, alone and beside another loss."""
    student, teacher = tiny(0), tiny(1)
    ids = torch.randint(SIZES["vocab_size"], (sum(LENGTHS),))
    written = rep_step.written_tokens(batch())
    loss = plain(
        student, teacher, zip(ids.split(LENGTHS), written.split(LENGTHS), strict=True), shift=1
    )
    loss.backward()
    wanted = gradients(student)
    step = rep_step.RepStep(oprd.attach(student, teacher, layers="all", kind="mse", shift="before"))
    step.begin(written, PLACES)
    batches = [micro_batch(rep_step, ids, part, packed) for part in parts]

    figures = {"rep_loss": 0.0, "rep_cosine": 0.0}
    for inputs in batches:
        out = step.alone(inputs)
        out.loss.backward()
        figures = {name: figures[name] + value for name, value in step.summary(out).items()}
    assert_equal(gradients(student), wanted)
    whole = oprd.attach(tiny(0), teacher, layers="all", kind="mse", shift="before")
    whole = whole(**micro_batch(rep_step, ids, slice(0, 4), packed))
    assert figures["rep_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert figures["rep_cosine"].item() == pytest.approx(whole.layer_cosine.mean().item(), rel=1e-4)

    def other(inputs) -> Tensor:
        call = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = student(**call, use_cache=False).logits
        return logits[inputs["response_mask"]].logsumexp(-1).sum()

    for inputs in batches:
        other(inputs).backward()
    theirs = gradients(student)
    for inputs in batches:
        with step.beside(inputs) as session:
            policy = other(inputs)
        (policy + 2.0 * session.output().loss).backward()
    both = {name: g + 2.0 * wanted[name] if name in wanted else g for name, g in theirs.items()}
    assert_equal(gradients(student), both)


def test_ranks_average_to_the_same_update(rep_step):
    """Two processes with other sequences each: the mean of their gradients."""
    student, teacher = tiny(0), tiny(1)
    ids = torch.randint(SIZES["vocab_size"], (sum(LENGTHS),))
    distiller = oprd.attach(student, teacher, layers="last", kind="mse")
    distiller(**micro_batch(rep_step, ids, slice(0, 4), True)).loss.backward()
    wanted = gradients(student)
    halves = [micro_batch(rep_step, ids, half, True) for half in (slice(0, 2), slice(2, 4))]
    parts = [(inputs["response_mask"][0], inputs["position_ids"][0]) for inputs in halves]
    counted = []
    for part in parts:  # what each process would add
        rep_step.RepStep(distiller, everywhere=lambda x: counted.append(x.clone())).begin(*part)
    total = torch.stack(counted).sum(0)
    figures = []
    for inputs, part in zip(halves, parts, strict=True):
        one = rep_step.RepStep(distiller, ranks=2, everywhere=lambda x: x.copy_(total))
        one.begin(*part)
        out = one.alone(inputs)
        (out.loss / 2).backward()
        figures.append(one.summary(out))
    assert_equal(gradients(student), wanted)
    whole = distiller(**micro_batch(rep_step, ids, slice(0, 4), True))
    for name, value in (("rep_loss", whole.loss), ("rep_cosine", whole.layer_cosine.mean())):
        mean = sum(figure[name] for figure in figures).item() / 2
        assert mean == pytest.approx(value.item(), rel=1e-4)


def test_a_micro_batch_without_a_written_token_adds_nothing(rep_step):
    """But it has gradients, of zeros: the other processes wait for them."""
    student, teacher = tiny(0), tiny(1)
    step = rep_step.RepStep(oprd.attach(student, teacher, layers="all", kind="mse"))
    inputs = micro_batch(rep_step, torch.ones(sum(LENGTHS)).long(), slice(0, 4), True)
    step.begin(inputs["response_mask"][0], inputs["position_ids"][0])
    step.alone(inputs).loss.backward()
    some = gradients(student)
    nothing = torch.zeros_like(inputs["response_mask"])
    step.begin(nothing[0], inputs["position_ids"][0])
    out = step.alone(inputs | {"response_mask": nothing})
    out.loss.backward()
    found = gradients(student)
    assert found.keys() == some.keys()
    assert not any(g.any() for g in found.values())
    assert all(value == 0 for value in step.summary(out).values())


@pytest.mark.parametrize("found", ["0.8.0", "0.9.2", "0.10.0", None])
def test_verl_of_another_version_is_refused(monkeypatch, rep_step, found):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    spec = importlib.util.spec_from_file_location("oprd_actor", RECIPE / "oprd_actor.py")
    message = rf"verl 0\.9\.1's .*verl {found} is installed" if found else "verl is not installed"
    with pytest.raises(ImportError, match=rf"{message}.*pip install verl==0\.9\.1"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def updates(directory: Path, names: list[str], ranks: int = 1) -> list[dict]:
    """Run `verl_update.py` on some of `CASES`, and return what it saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output, running = directory / "updates.pt", []
    actor, model = "actor_rollout_ref.actor.", "actor_rollout_ref.model."
    always = [
        f"{model}path={directory / 'student'}",
        f"{actor}oprd.teacher={directory / 'teacher'}",
        "data.train_files=none",
        # Weights move by the gradient; in float32 and without FlashAttention.
        f"{actor}optim.optimizer=SGD",
        f"{actor}optim.lr=1.0",
        f"{actor}optim.weight_decay=0.0",
        f"{actor}optim.clip_grad=1e9",
        f"{actor}optim.lr_warmup_steps_ratio=0.0",
        f"{actor}optim.lr_scheduler_type=constant",
        f"{actor}optim.total_training_steps=10",
        f"+{model}override_config.attn_implementation=eager",
        f"+{actor}fsdp_config.mixed_precision={{param_dtype: fp32}}",
        f"{actor}fsdp_config.use_torch_compile=false",
    ]
    for rank in range(ranks):
        env = os.environ | {
            "PYTHONPATH": f"{RECIPE}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, str(Path(__file__).with_name("verl_update.py")), str(output)]
        for name in names:
            case = {"overrides": [*always, *CASES[name]], "v1": name != "padded"}
            case["masked"] = MASKED.get(name, [])
            command.append(json.dumps(case))
        with (directory / f"{rank}.log").open("w") as log:
            running.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=900) for process in running]
    finally:
        for process in running:
            process.kill()
    logs = [(directory / f"{rank}.log").read_text()[-4000:] for rank in range(ranks)]
    assert not any(codes), "\n".join(logs)
    return torch.load(output, weights_only=False)


@pytest.fixture(scope="module")
def verl():
    return pytest.importorskip("verl", reason="verl is not installed: see its recipe's README")


@pytest.fixture(scope="module")
def models(verl, tmp_path_factory):
    """A directory with a student and a teacher, as verl loads them: with the demo's tokenizer."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "oprd/demo/student")
    for seed, name in enumerate(("student", "teacher")):
        tiny(seed).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


WEIGHTS = [f"actor_rollout_ref.actor.oprd.{name}_weight=" for name in ("rep", "policy")]
CASES = {
    "packed": ["actor_rollout_ref.model.use_remove_padding=true"],
    "padded": [  # in two micro-batches
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.actor.use_dynamic_bsz=false",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    ],
    "policy": [WEIGHTS[0] + "0.0", WEIGHTS[1] + "1.0"],
    "both": [WEIGHTS[0] + "3.0", WEIGHTS[1] + "0.5"],
    "bf16": ["actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=bf16"],
    "lora": ["actor_rollout_ref.model.lora_rank=4"],
    "accumulated": [  # sequence by sequence; gradients are reduced once
        "actor_rollout_ref.actor.use_dynamic_bsz=false",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.fsdp_config.use_no_sync_for_gradient_accumulation=true",
    ],
    "idle": [],
}
MASKED = {"idle": [1, 3]}  # without a written token: all of the second of two processes


@pytest.fixture(scope="module")
def found(models):
    """What each of `CASES` changes, on one process."""
    return dict(zip(CASES, updates(models, list(CASES)), strict=True))


def by_hand(models: Path, masked: Sequence[int] = ()) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of the rollouts of `verl_update.py`, by plain autograd."""
    from tests.examples.verl_update import PROMPT, rollouts

    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(
            models / name, dtype=torch.float32, attn_implementation="eager"
        )
        for name in ("student", "teacher")
    )
    data = rollouts(SIZES["vocab_size"], masked)
    sequences = []
    for ids, attention, written in zip(
        data["input_ids"], data["attention_mask"].bool(), data["response_mask"], strict=True
    ):
        mask = torch.cat([torch.zeros(PROMPT, dtype=torch.bool), written.bool()])
        sequences.append((ids[attention], mask[attention]))
    loss = plain(ours, theirs, sequences)
    loss.backward()
    return loss.item(), gradients(ours)


def moved(found: dict) -> dict[str, Tensor]:
    """The gradient by which SGD with a learning rate of 1 has moved the weights, where it did."""
    steps = {name: value - found["after"][name] for name, value in found["before"].items()}
    return {name: step for name, step in steps.items() if step.any()}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["packed", "padded", "accumulated", "idle"])
def test_verls_update_is_that_of_plain_autograd(models, found, case):
    """The whole of it: configuration, worker, engine, FSDP2 on one process, and the optimizer."""
    loss, gradient = by_hand(models, MASKED.get(case, ()))
    assert_equal(moved(found[case]), gradient)
    metrics = found[case]["metrics"]
    assert metrics["rep_loss"] == pytest.approx([loss], rel=1e-4)
    assert metrics["loss"] == pytest.approx([loss], rel=1e-4)
    assert set(found[case]["sent"]) == set(found[case]["before"])


@pytest.mark.slow
def test_verls_own_loss_is_added(models, found):
    _, gradient = by_hand(models)
    policy = moved(found["policy"])
    assert policy.keys() > gradient.keys()  # the LM head, too
    wanted = {name: 0.5 * g + 3 * gradient.get(name, 0 * g) for name, g in policy.items()}
    assert_equal(moved(found["both"]), wanted)
    name = "actor/pg_loss"
    assert found["both"]["metrics"][name] == pytest.approx(found["policy"]["metrics"][name])


@pytest.mark.slow
def test_verls_update_in_bfloat16(models, found):
    """verl's default: autocast, and a teacher in bfloat16."""
    _, gradient = by_hand(models)
    steps = moved(found["bf16"])
    ours, exact = (torch.cat([g[name].flatten() for name in gradient]) for g in (steps, gradient))
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.999
    assert not torch.equal(ours, exact)


@pytest.mark.slow
def test_verls_update_of_a_lora_adapter(models, found):
    """At first, when B = 0, only B moves: by alpha / r times the weight's gradient times A."""
    _, gradient = by_hand(models)
    before, steps = found["lora"]["before"], moved(found["lora"])
    assert len(steps) == 7 * SIZES["num_hidden_layers"]  # linear layers of a block
    for name, step in steps.items():
        weight = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
        a = before[name.replace("lora_B", "lora_A")]
        assert torch.allclose(step, 16 / 4 * gradient[weight] @ a.T, rtol=1e-3, atol=1e-6), name


@pytest.mark.slow
def test_verls_update_on_two_processes(models, found):
    """gloo: student and teacher sharded; the same gradient, also if a process has no token."""
    cases = ["packed", "accumulated", "idle", "both"]
    for case, sharded in zip(cases, updates(models, cases, ranks=2), strict=True):
        assert_equal(moved(sharded), moved(found[case]))
        for name in ("rep_loss", "rep_cosine", "loss"):
            assert sharded["metrics"][name] == pytest.approx(found[case]["metrics"][name], rel=1e-4)


def composed(*overrides: str):
    """What `run.sh` hands to verl."""
    from hydra import compose, initialize_config_dir

    model, actor = "actor_rollout_ref.model.path=x", "actor_rollout_ref.actor.oprd.teacher=x"
    with initialize_config_dir(str(RECIPE), version_base=None):
        return compose("oprd_trainer", overrides=["data.train_files=x", model, actor, *overrides])


def test_verl_accepts_the_configuration(verl, rep_step):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.utils.import_utils import load_extern_object

    config = composed("trainer.n_gpus_per_node=8")
    needs = {"use_reference_policy": need_reference_policy(config)}
    needs["use_critic"] = need_critic(config)
    assert needs == {"use_reference_policy": False, "use_critic": False}
    validate_config(config, **needs)
    assert type(omega_conf_to_dataclass(config.actor_rollout_ref.actor)).__module__ == "oprd_actor"
    reward = config.reward.custom_reward_function
    assert load_extern_object(reward.path, reward.name)(solution_str="4", ground_truth="") == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("strategy=fsdp", "must be fsdp2"),
        ("ulysses_sequence_parallel_size=2", "must be 1"),
        ("entropy_coeff=0.1", "entropy_coeff=0"),
        ("oprd.teacher=null", "teacher is not set"),
    ],
)
def test_options_that_do_not_fit_are_refused(verl, rep_step, option, message):
    from verl.utils.config import omega_conf_to_dataclass

    config = composed(f"actor_rollout_ref.actor.{option}")
    with pytest.raises(Exception, match=message):  # hydra's own, around a ConfigError
        omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_images_are_refused(verl, rep_step):
    from oprd_actor import OPRDEngine

    engine = object.__new__(OPRDEngine)
    for data in (
        {"position_ids": torch.zeros(1, 4, 3)},  # M-RoPE
        {
            "position_ids": torch.zeros(1, 3),
            "multi_modal_inputs": [{"pixel_values": torch.ones(1)}],
        },
    ):
        with pytest.raises(ConfigError, match="texts only"):
            engine.forward_backward_batch(data, None)


@pytest.mark.slow
def test_the_command(verl):
    """Up to where verl begins: it prints the configuration that it was given."""
    command = ["bash", str(RECIPE / "run.sh"), "a student", "teacher", "prompts.parquet"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        [*command, "data.train_batch_size=16", "--cfg", "job"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for line in (
        "path: a student",
        "teacher: teacher",
        "train_files: prompts.parquet",
        "train_batch_size: 16",
        "_target_: oprd_actor.OPRDActorConfig",
    ):
        assert f" {line}\n" in result.stdout


def test_the_command_asks_for_what_is_missing():
    result = subprocess.run(
        ["bash", str(RECIPE / "run.sh"), "student"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode != 0
    assert "teacher" in result.stderr
