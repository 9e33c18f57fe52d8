"""What `benchmarks.architectures` tries with every family: one function a column of its table.

Each takes a small configuration and returns None if it works, or a few words that limit what works.
What oprd refuses is a `ConfigError` or `ValueError`. Anything else that is raised is a bug.
Expected values are what plain autograd computes from the model's own ``output_hidden_states``.

Shapes: B sequences of T tokens, L blocks, d hidden width.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.small_models import DRAWS_EXPERTS, STATES_FROM_BLOCK_0, make
from oprd import attach
from oprd.bridge.bank import Bridge, BridgeInfo
from oprd.checkpoint import save_student
from oprd.config import LoraConfig
from oprd.config.objectives import DistillConfig, OpdConfig
from oprd.data.collate import Batch
from oprd.demo.task import make_tokenizer
from oprd.distill.objectives import Objectives
from oprd.errors import ConfigError
from oprd.models.decoder import find_decoder
from oprd.models.info import model_info
from oprd.models.loading import switch_off_dropout
from oprd.models.lora import add_adapter
from oprd.models.packing_check import check_packing
from oprd.models.self_check import check_structure, cut_if_it_runs, same_states

B, T, PROMPT, RANK = 2, 12, 5, 4
Compared = Callable[[int, Tensor, Tensor], Tensor]


def batch() -> Batch:
    """Return sequences without padding: experts may treat tokens differently beside padding."""
    ids = torch.randint(3, 40, (B, T), generator=torch.Generator().manual_seed(0))
    response = torch.zeros(B, T, dtype=torch.bool)
    response[:, PROMPT:] = True
    return Batch(ids, torch.ones_like(ids), response)


def trained(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a model as a run trains it: in training mode, without dropout."""
    model = make(config, seed).train(config.model_type not in DRAWS_EXPERTS)
    switch_off_dropout(model)
    return model


def own_states(model: PreTrainedModel) -> list[Tensor]:
    """Return the model's own hidden states of all blocks, L tensors (B, T, d)."""
    backbone = find_decoder(model).backbone
    data = batch()
    states = backbone(
        input_ids=data.input_ids,
        attention_mask=data.attention_mask,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    if model.config.model_type in STATES_FROM_BLOCK_0:
        return [*states[:-2], states[-1]]
    return list(states[1:])


def mean_squares(_block: int, ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).square().mean()


def expected(
    config: PretrainedConfig, pairs: Sequence[tuple[int, int]], compare: Compared = mean_squares
) -> tuple[Tensor, PreTrainedModel]:
    """Return the loss by the book, and a student with its gradients."""
    student, teacher = trained(config), make(config, seed=1)
    rows = batch().response_mask
    ours = own_states(student)
    with torch.no_grad():
        theirs = own_states(teacher)
    loss = torch.stack([compare(s, ours[s][rows], theirs[t][rows]) for s, t in pairs]).mean()
    loss.backward()
    return loss.detach(), student


def assert_close(name: str, found: float | Tensor, wanted: float | Tensor, share: float) -> None:
    """Check two numbers or tensors up to a share of the norm of the second."""
    a, b = (torch.as_tensor(x).detach().double() for x in (found, wanted))
    if a.shape != b.shape or not bool((a - b).norm() <= share * b.norm() + 1e-9):
        apart = (a - b).norm() / b.norm() if a.shape == b.shape else math.nan
        raise AssertionError(f"{name} is off by {apart:.2g} of its norm, {b.norm():.3g}")


def assert_same_gradients(found: nn.Module, wanted: nn.Module) -> None:
    theirs = dict(wanted.named_parameters())
    scale = max(p.grad.norm().item() for p in theirs.values() if p.grad is not None)
    for name, parameter in found.named_parameters():
        zero = torch.zeros_like(parameter)
        a, b = (zero if p.grad is None else p.grad for p in (parameter, theirs[name]))
        if (a - b).norm() > 1e-6 * scale:  # beside which it is rounding
            assert_close(f"the gradient of {name}", a, b, 2e-3)


def compare_with_attach(config: PretrainedConfig, layers: str, checkpointing: bool = False) -> None:
    student, data = trained(config), batch()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    distiller = attach(student, make(config, seed=1), layers=layers, positions="all")
    out = distiller(data.input_ids, data.attention_mask, data.response_mask)
    out.loss.backward()
    loss, other = expected(config, distiller.pairs)
    assert_close("the loss", out.loss, loss, 1e-4)
    assert_same_gradients(distiller.student.root, other)


def attach_all(config: PretrainedConfig) -> None:
    """`attach` with all layers: loss and gradients."""
    compare_with_attach(config, "all")


def attach_even(config: PretrainedConfig) -> None:
    """`attach` with every other layer, for which the teacher is cut: loss and gradients."""
    compare_with_attach(config, "even")


def attach_last(config: PretrainedConfig) -> None:
    """`attach` with the last layer alone: loss and gradients."""
    compare_with_attach(config, "last")


def checkpointing(config: PretrainedConfig) -> str | None:
    """`attach` with gradient checkpointing: loss and gradients."""
    if not make(config).supports_gradient_checkpointing:
        return "transformers has none"
    compare_with_attach(config, "all", checkpointing=True)
    return None


def cut_teacher(config: PretrainedConfig) -> str | None:
    """A teacher of two blocks has the states of the whole."""
    decoder = find_decoder(make(config))
    short = cut_if_it_runs(decoder, 2)
    if short is decoder:
        return "kept whole"
    assert same_states(decoder, short, [0, 1], decoder.num_layers), "its states differ"
    return None


def dry_run(config: PretrainedConfig) -> str | None:
    """What ``--dry_run`` says from the configuration alone is what `attach` says."""
    seen: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("oprd.models.self_check")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    layers = model_info(config).layers
    assert layers is not None
    by_config = refusal(lambda: check_structure(config, range(layers), "student"))
    by_model = refusal(lambda: attach(make(config), make(config, seed=1)))
    if by_model and not by_config:
        raise AssertionError(f"it says yes; attach says: {by_model}")
    if by_config and not by_model:
        raise AssertionError(f"it says: {by_config}; attach works")
    if by_config:
        raise ConfigError(by_config)
    unchecked = [message for message in seen if "does not run without weights" in message]
    return unchecked[0].partition("without weights")[2].strip(": ") if unchecked else None


def refusal(action: Callable[[], object]) -> str | None:
    try:
        action()
    except (ConfigError, ValueError) as error:
        return str(error)
    return None


def opd(config: PretrainedConfig) -> str | None:
    """OPD over the full vocabulary: chunked, the loss and gradients of materialised logits."""
    found = {}
    for way in ("materialised", "chunked"):
        student, data = trained(config), batch()
        objectives = Objectives(
            {"opd_full": 1.0}, student, {"": make(config, seed=1)}, {}, DistillConfig(),
            OpdConfig(implementation=way, chunk_tokens=3),
        )  # fmt: skip
        try:
            objectives.check_models()
        except ConfigError as error:
            return f"materialised only: {error}"
        chosen = objectives.supervise(data)
        teacher = objectives.teacher_pass(data, chosen, "")
        totals = objectives.totals([chosen], torch.device("cpu"))
        loss = objectives.student_pass(data, chosen, teacher, totals).loss
        loss.backward()
        found[way] = (loss, student)
    (wanted, theirs), (loss, ours) = found["materialised"], found["chunked"]
    assert_close("the chunked loss", loss, wanted, 1e-4)
    assert_same_gradients(ours, theirs)
    return None


def packing(config: PretrainedConfig) -> None:
    """Packed sequences do not see each other, or packing is refused."""
    decoder = find_decoder(make(config))
    ids = batch().input_ids
    first, second = ids[:1, :7], ids[1:, :9]
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    refused = refusal(lambda: check_packing(decoder, "student"))
    with torch.no_grad():
        alone = torch.cat([decoder.forward(first), decoder.forward(second)], 1)
        try:
            packed = decoder.forward(torch.cat([first, second], 1), None, positions)
        except Exception:
            if refused is None:
                raise
            raise ConfigError(refused) from None
    apart = ((packed - alone).norm() / alone.norm()).item()
    if refused is None and apart > 1e-3:
        raise AssertionError(f"packing passes its check, and states differ by {apart:.2g}")
    if refused is not None:
        if apart < 1e-5:
            raise AssertionError("packing is refused, and states are the same")
        raise ConfigError(refused)


def lora(config: PretrainedConfig) -> str | None:
    """An adapter on all linear layers learns; merged, saved and loaded it is the same model."""
    student, data = trained(config), batch()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    add_adapter(student, LoraConfig(rank=2, alpha=4))
    distiller = attach(student, make(config, seed=1), positions="all")
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(weights, lr=3e-3), []
    for _ in range(8):
        out = distiller(data.input_ids, data.attention_mask, data.response_mask)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0], f"its loss goes from {losses[0]:.4g} to {losses[-1]:.4g}"
    for name, p in student.named_parameters():
        old = before.get(name.replace(".base_layer", ""))
        assert old is None or torch.equal(p, old), f"the frozen weight {name} has moved"
    distiller.detach()
    return saved_and_loaded(student)


def bridge(config: PretrainedConfig) -> None:
    """A random bridge: loss and gradients."""
    d, layers = model_info(config).width, model_info(config).layers
    assert layers is not None
    student, teacher, data = trained(config), make(config, seed=1), batch()
    pairs = [(block, block) for block in range(layers)]
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> dict[int, Tensor]:
        return {block: torch.randn(*shape, generator=random) for block, _ in pairs}

    info = BridgeInfo(model_info(config), model_info(config), pairs, RANK, "import")
    made = Bridge(draw(RANK, d), draw(RANK, d), draw(d), info)
    distiller = attach(student, teacher, positions="all", kind="nmse", bridge=made)
    out = distiller(data.input_ids, data.attention_mask, data.response_mask)
    out.loss.backward()

    def projected(block: int, ours: Tensor, theirs: Tensor) -> Tensor:
        z_s = ours @ made.student_proj[block].T
        z_t = (theirs - made.teacher_mean[block]) @ made.teacher_proj[block].T
        return mean_squares(block, *(z / z.norm(dim=-1, keepdim=True) for z in (z_s, z_t)))

    loss, other = expected(config, pairs, projected)
    assert_close("the loss", out.loss, loss, 1e-4)
    assert_same_gradients(student, other)


def save(config: PretrainedConfig) -> str | None:
    """The student's files, loaded by transformers, give the same logits."""
    student = make(config)
    find_decoder(student)  # no other student is saved
    return saved_and_loaded(student)


@torch.no_grad()
def saved_and_loaded(student: PreTrainedModel) -> str | None:
    note = None
    student.eval()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "student"
        save_student(student, make_tokenizer(), path)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            loaded = type(student).from_pretrained(path, dtype=torch.float32)
            note = f"its files load as {type(student).__name__}, not by AutoModelForCausalLM"
    ids = batch().input_ids
    ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (student, loaded.eval()))
    assert_close("the logits of the files", theirs, ours, 1e-5)
    return note


CHECKS: dict[str, Callable[[PretrainedConfig], str | None]] = {
    "attach, all": attach_all,
    "attach, even": attach_even,
    "attach, last": attach_last,
    "checkpointing": checkpointing,
    "cut": cut_teacher,
    "dry run": dry_run,
    "OPD": opd,
    "packing": packing,
    "LoRA": lora,
    "Bridge": bridge,
    "save": save,
}
"""Columns of the table that one process fills; `benchmarks.architecture_ranks` fills FSDP2."""
