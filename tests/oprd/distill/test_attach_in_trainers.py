"""The distiller inside what trainers wrap around a model: autocast, DDP, accumulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from oprd import attach, supervise
from tests.support.tiny import ARCHITECTURES, make_batch, make_model

ROOT = Path(__file__).parents[3]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class OPRDTrainer(Trainer):
    """Counts what it is given, and trains on the representation loss alone."""

    distiller = None
    denominator = None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.denominator

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = self.distiller(**inputs, model=model, denominator=num_items_in_batch)
        return (out.loss, None) if return_outputs else out.loss


def trained_by_hugging_face(tmp_path, student, teacher, rows, denominator=None, **arguments):
    """The student's weights after one step of SGD, and the loss that the Trainer logs."""
    args = TrainingArguments(
        tmp_path,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **arguments,
    )
    trainer = OPRDTrainer(student, args, train_dataset=rows)
    trainer.distiller = attach(student, teacher, positions="all")
    trainer.denominator = denominator
    # With a count, the Trainer does not divide by the accumulation steps (from transformers 5.16).
    trainer.model_accepts_loss_kwargs = denominator is not None
    trainer.train()
    trainer.distiller.detach()
    weights = {n: p.detach().clone() for n, p in student.named_parameters()}
    return weights, trainer.state.log_history[0]["loss"]


def examples():
    """The rows of `make_batch` with a fourth, in an order that the Trainer's shuffling keeps apart:
    every micro-batch has another number of supervised tokens."""
    ids, attention, response = (torch.cat([x, x[:1]]) for x in make_batch())
    return [
        {"input_ids": i, "attention_mask": a, "response_mask": r}
        for i, a, r in zip(ids, attention, response, strict=True)
    ]


def test_accumulation_does_not_change_loss_or_step(tmp_path):
    rows = examples()
    total = int(sum(row["response_mask"].sum() for row in rows))
    made = []
    for size, parts in [(4, 1), (2, 2), (1, 4)]:
        student, teacher = make_model("llama"), make_model("llama", seed=1)
        made.append(
            trained_by_hugging_face(
                tmp_path,
                student,
                teacher,
                rows,
                denominator=total,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=parts,
            )
        )
    (whole, loss), *others = made
    start = dict(make_model("llama").named_parameters())
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    for weights, logged in others:
        assert logged == pytest.approx(loss, rel=1e-5)
        for name, value in whole.items():
            assert torch.allclose(weights[name], value, atol=1e-6), name


def test_the_trainers_autocast_holds(tmp_path):
    """bf16=True: the student computes in bfloat16, as under a context around the call; before, its
    backbone ran in float32 whatever the Trainer was told."""
    rows = examples()
    losses = {}
    seen = []
    for name in ("float32", "bf16"):
        student, teacher = make_model("llama"), make_model("llama", seed=1)
        watched = student.model.layers[0].mlp.up_proj
        watched.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
        arguments = {"per_device_train_batch_size": 4, "bf16": name == "bf16"}
        _, losses[name] = trained_by_hugging_face(tmp_path, student, teacher, rows, **arguments)
        dtypes = set(seen[-1:])
        assert dtypes == {torch.bfloat16 if name == "bf16" else torch.float32}
    student, teacher = make_model("llama").train(), make_model("llama", seed=1)
    distiller = attach(student, teacher, positions="all")
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    chosen = distiller.supervise(batch["response_mask"])
    states = distiller.teacher_states(batch["input_ids"], batch["attention_mask"], chosen.rows)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = distiller.student_loss(
            batch["input_ids"], batch["attention_mask"], chosen.rows, states
        )
    assert losses["bf16"] == pytest.approx(wanted.loss.item(), rel=1e-5)
    assert abs(losses["bf16"] / losses["float32"] - 1) > 1e-4


def test_denominator_of_a_whole_batch():
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    ids, attention, response = make_batch()
    distiller = attach(student, teacher, reduction="seq-mean")
    whole = distiller(ids, attention, response)
    whole.loss.backward()
    wanted = gradients(student)
    student.zero_grad()
    parts = [slice(0, 2), slice(2, 3)]
    total = sum(distiller.supervise(response[at]).total for at in parts)
    assert total == 3
    losses = []
    for at in parts:
        as_tensor = torch.tensor(float(total))
        out = distiller(ids[at], attention[at], response[at], denominator=as_tensor)
        out.loss.backward()
        losses.append(out.loss.detach())
    assert torch.allclose(sum(losses), whole.loss.detach())
    for name, gradient in gradients(student).items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-7), name


def test_supervise_is_what_a_call_uses():
    student, teacher = make_model("qwen2"), make_model("qwen2", seed=1)
    distiller = attach(student, teacher, positions="first_k", k=2, reduction="seq-mean")
    ids, attention, response = make_batch()
    chosen = distiller.supervise(response.long())
    by_hand = supervise(response, "first_k", 2, reduction="seq-mean")
    assert torch.equal(chosen.rows, by_hand.rows)
    assert torch.equal(chosen.weights, by_hand.weights)
    states = distiller.teacher_states(ids, attention, chosen.rows)
    with distiller.taps(states, chosen.rows, chosen.weights, chosen.total) as session:
        student(ids, attention)
    assert torch.allclose(session.output().loss, distiller(ids, attention, response).loss)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_models_own_call_runs_without_its_head(architecture):
    """Whatever an architecture does to its logits. Afterwards the head is as it was."""
    student = make_model(architecture)
    distiller = attach(student, make_model(architecture, seed=1))
    ids, attention, response = make_batch()
    before = student(ids, attention_mask=attention).logits
    shapes = []
    handle = student.register_forward_hook(lambda _m, _a, out: shapes.append(out.logits.shape))
    distiller(ids, attention, response).loss.backward()
    handle.remove()
    assert shapes == [(*ids.shape, 1)]
    assert torch.equal(student(ids, attention_mask=attention).logits, before)
    head, embeddings = student.get_output_embeddings(), student.get_input_embeddings()
    if head.weight is not embeddings.weight:
        assert head.weight.grad is None


def test_a_head_whose_forward_was_replaced_gets_it_back():
    student = make_model("llama")
    own = student.lm_head.forward = lambda h: h * 2
    attach(student, make_model("llama", seed=1))(*make_batch())
    assert student.lm_head.__dict__["forward"] is own


def test_wrappers_are_seen_through():
    student, teacher = make_model("llama"), make_model("llama", seed=1)
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            calls.append(inputs["input_ids"].shape)
            return self.module(**inputs)

    wrapped = Wrapper(student)
    plain = attach(student, teacher)
    loss = plain(*make_batch()).loss
    assert torch.equal(plain(*make_batch(), model=wrapped).loss, loss)
    plain.detach()
    assert torch.equal(attach(wrapped, teacher)(*make_batch()).loss, loss)
    assert len(calls) == 2


def test_what_changes_the_batch_on_the_way_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    student = peft.get_peft_model(make_model("llama"), config)
    distiller = attach(student, make_model("llama", seed=1))
    with pytest.raises(ValueError, match=r"\(3, 14, 32\) for a batch of 36 tokens.*Prompt tuning"):
        distiller(*make_batch())


def test_masks_of_another_shape_are_refused():
    distiller = attach(make_model("llama"), make_model("llama", seed=1))
    ids, attention, response = make_batch()
    with pytest.raises(ValueError, match=r"response_mask has shape \(3, 8\) and input_ids \(3, 12"):
        distiller(ids, attention, response[:, 4:])
    with pytest.raises(ValueError, match=r"response_mask has shape \(36,\)"):
        distiller(ids, attention, response.flatten())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1, 12, 12\)"):
        distiller(ids, torch.ones(3, 1, 12, 12), response)
    with pytest.raises(ValueError, match=r"response_mask is True for tokens.*padding"):
        distiller(ids, attention, torch.ones_like(response))


@pytest.mark.parametrize(
    ("changes", "layers", "frozen"),
    [
        ({}, "all", {"lm_head.weight"}),
        ({"tie_word_embeddings": True}, "all", set()),
        ({}, [0], {"lm_head.weight", "model.norm.weight", "model.layers.1", "model.layers.2"}),
    ],
)
def test_parameters_that_the_loss_does_not_reach_are_frozen(changes, layers, frozen):
    student = make_model("llama", **changes)
    distiller = attach(student, make_model("llama", seed=1, **changes), layers=layers)
    names = distiller.freeze_unreached()
    assert {next((f for f in frozen if name.startswith(f)), name) for name in names} == frozen
    distiller(*make_batch()).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == (name not in names)
        assert (parameter.grad is not None) == (name not in names), name


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """The directory where two ranks have left their weights, by case."""
    directory = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.support.attach_on_ranks", str(directory)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unused", "frozen", "fsdp2"])
def test_two_ranks_train_as_one(on_two_ranks, case):
    """DDP, with an LM head that gets no gradient (looked for, or frozen), and FSDP2."""
    found = torch.load(on_two_ranks / f"{case}.pt")
    student, teacher = make_model("llama"), make_model("llama", seed=1)
    distiller = attach(student, teacher, layers=[0] if case == "unused" else "all")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        distiller(*make_batch(seed=seed)).loss.backward()
        optimizer.step()
    for name, value in student.state_dict().items():
        assert torch.allclose(found[name], value, atol=1e-6), name
