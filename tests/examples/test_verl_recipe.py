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
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import oprd

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
LENGTHS = torch.tensor([length for length, _, _ in SEQUENCES])
RESPONSES = torch.tensor([response for _, response, _ in SEQUENCES])
MASK = torch.tensor([mask + [0] * (5 - len(mask)) for _, _, mask in SEQUENCES])


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


def plain(student, teacher, sequences: list[tuple[Tensor, Tensor]], shift: int = 0) -> Tensor:
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


def test_response_tokens(rep_step):
    by_hand = [0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1]
    padded = rep_step.response_tokens(MASK, RESPONSES, LENGTHS)
    assert padded.tolist() == [bool(x) for x in by_hand]
    parts = [torch.tensor(mask) for _, _, mask in SEQUENCES]
    jagged = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    assert torch.equal(rep_step.response_tokens(jagged, RESPONSES, LENGTHS), padded)


def micro_batch(rep_step, ids: Tensor, some: slice, packed: bool):
    """The inputs of some of the sequences, as verl hands them to the student."""
    written = rep_step.response_tokens(MASK[some], RESPONSES[some], LENGTHS[some])
    sequences = ids.split(LENGTHS.tolist())[some]
    positions = [torch.arange(len(s)) for s in sequences]
    if packed:  # with two tokens of padding, as verl's pad_to_length has them
        tokens = torch.cat([*sequences, torch.zeros(2, dtype=torch.long)])
        places = torch.cat([*positions, torch.arange(2)])
        return rep_step.Inputs.of(tokens[None], None, places[None], written)
    pad = torch.nn.utils.rnn.pad_sequence
    attention = pad([torch.ones(len(s), dtype=torch.int32) for s in sequences], batch_first=True)
    tokens, places = pad(list(sequences), batch_first=True), pad(positions, batch_first=True)
    return rep_step.Inputs.of(tokens, attention, places, written)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("parts", [[slice(0, 4)], [slice(0, 1), slice(1, 3), slice(3, 4)]])
def test_the_update_is_that_of_plain_autograd(rep_step, packed, parts):
    """However it is split into micro-batches, alone and beside another loss."""
    student, teacher = tiny(0), tiny(1)
    ids = torch.randint(SIZES["vocab_size"], (int(LENGTHS.sum()),))
    written = rep_step.response_tokens(MASK, RESPONSES, LENGTHS)
    per_sequence = list(
        zip(ids.split(LENGTHS.tolist()), written.split(LENGTHS.tolist()), strict=True)
    )
    loss = plain(student, teacher, per_sequence, shift=1)
    loss.backward()
    wanted = gradients(student)
    step = rep_step.RepStep(oprd.attach(student, teacher, layers="all", kind="mse", shift="before"))
    step.begin(written, torch.cat([torch.arange(n) for n in LENGTHS.tolist()]))
    batches = [micro_batch(rep_step, ids, part, packed) for part in parts]

    figures = {"rep_loss": 0.0, "rep_cosine": 0.0}
    for inputs in batches:
        out = step.alone(inputs)
        out.loss.backward()
        figures = {name: figures[name] + value for name, value in step.summary(out).items()}
    assert_equal(gradients(student), wanted)
    assert figures["rep_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert -1 < figures["rep_cosine"] < 1

    def other(inputs) -> Tensor:
        call = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        logits = student(**call, position_ids=inputs.position_ids, use_cache=False).logits
        return logits[inputs.response].logsumexp(-1).sum()

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
    ids = torch.randint(SIZES["vocab_size"], (int(LENGTHS.sum()),))
    distiller = oprd.attach(student, teacher, layers="last", kind="mse")
    whole = rep_step.RepStep(distiller)
    places = torch.cat([torch.arange(n) for n in LENGTHS.tolist()])
    whole.begin(rep_step.response_tokens(MASK, RESPONSES, LENGTHS), places)
    whole.alone(micro_batch(rep_step, ids, slice(0, 4), True)).loss.backward()
    wanted = gradients(student)
    halves = [slice(0, 2), slice(2, 4)]
    counted = []
    for half in halves:  # first only counts
        alone = rep_step.RepStep(distiller, everywhere=lambda x: counted.append(x.clone()))
        inputs = micro_batch(rep_step, ids, half, True)
        alone.begin(inputs.response[0], inputs.position_ids[0])
    total = torch.stack(counted).sum(0)
    for half in halves:
        one = rep_step.RepStep(distiller, ranks=2, everywhere=lambda x: x.copy_(total))
        inputs = micro_batch(rep_step, ids, half, True)
        one.begin(inputs.response[0], inputs.position_ids[0])
        (one.alone(inputs).loss / 2).backward()
    assert_equal(gradients(student), wanted)


def test_a_micro_batch_without_a_written_token_adds_nothing(rep_step):
    student, teacher = tiny(0), tiny(1)
    ids = torch.randint(SIZES["vocab_size"], (1, 6))
    step = rep_step.RepStep(oprd.attach(student, teacher, layers="all", kind="mse"))
    nothing = torch.zeros(6, dtype=torch.bool)
    step.begin(nothing, torch.arange(6))
    inputs = rep_step.Inputs.of(ids, None, torch.arange(6)[None], nothing)
    out = step.alone(inputs)
    out.loss.backward()  # it must run: the other ranks wait for its gradients
    assert all(not g.any() for g in gradients(student).values())
    assert all(value == 0 for value in step.summary(out).values())


@pytest.mark.parametrize("found", ["0.8.0", "0.9.2", "0.10.0"])
def test_verl_of_another_version_is_refused(monkeypatch, rep_step, found):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: found)
    spec = importlib.util.spec_from_file_location("oprd_actor", RECIPE / "oprd_actor.py")
    with pytest.raises(ImportError, match=rf"verl 0\.9\.1's .*verl {found} is installed"):
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
def models(tmp_path_factory):
    """A directory with a student and a teacher, as verl loads them: with the demo's tokenizer."""
    pytest.importorskip("verl", reason="verl is not installed: see examples/verl_recipe/README.md")
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
}


@pytest.fixture(scope="module")
def found(models):
    """What each of `CASES` changes, on one process."""
    return dict(zip(CASES, updates(models, list(CASES)), strict=True))


def by_hand(models: Path) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of the rollouts of `verl_update.py`, by plain autograd."""
    from tests.examples.verl_update import PROMPT, rollouts

    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(
            models / name, dtype=torch.float32, attn_implementation="eager"
        )
        for name in ("student", "teacher")
    )
    data = rollouts(SIZES["vocab_size"])
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
@pytest.mark.parametrize("case", ["packed", "padded"])
def test_verls_update_is_that_of_plain_autograd(models, found, case):
    """The whole of it: configuration, worker, engine, FSDP2 on one process, and the optimizer."""
    loss, gradient = by_hand(models)
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
def test_verls_update_on_two_processes(models):
    """gloo: student and teacher sharded, and the same gradient."""
    (found,) = updates(models, ["packed"], ranks=2)
    loss, gradient = by_hand(models)
    assert_equal(moved(found), gradient)
    assert found["metrics"]["rep_loss"] == pytest.approx([loss], rel=1e-4)


def composed(*overrides: str):
    """What `run.sh` hands to verl."""
    from hydra import compose, initialize_config_dir

    model, actor = "actor_rollout_ref.model.path=x", "actor_rollout_ref.actor.oprd.teacher=x"
    with initialize_config_dir(str(RECIPE), version_base=None):
        return compose("oprd_trainer", overrides=["data.train_files=x", model, actor, *overrides])


def test_verl_accepts_the_configuration(rep_step):
    pytest.importorskip("verl", reason="verl is not installed: see examples/verl_recipe/README.md")
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
def test_options_that_do_not_fit_are_refused(monkeypatch, rep_step, option, message):
    pytest.importorskip("verl", reason="verl is not installed: see examples/verl_recipe/README.md")
    from verl.utils.config import omega_conf_to_dataclass

    config = composed(f"actor_rollout_ref.actor.{option}")
    with pytest.raises(Exception, match=message):  # hydra's own, around a ConfigError
        omega_conf_to_dataclass(config.actor_rollout_ref.actor)
