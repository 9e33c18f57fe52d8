"""Prediction of the actor update's peak memory, from shapes alone.

The update has several moments at which memory can peak. For each, every live tensor is a named
term. The predicted delta-peak is the largest sum of terms. Counted are the tensors that PyTorch's
eager mode keeps for a Qwen2-like block (RMSNorm, grouped-query attention, gated MLP). Weights,
preallocated gradients and the teacher's outputs are resident beforehand and listed separately.

Sizes are in bytes. B sequences of T tokens, N = B * T, M supervised rows, d hidden width, L blocks,
V vocabulary, e bytes per number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from oprd.memory_plan.shapes import FLOAT32, Shape, Update

TITLES = {
    "backbone": "backbone alone",
    "oprd": "OPRD, all layers",
    "oprd_last": "OPRD, last layer",
    "bridge": "Bridge, all layers",
    "opd_top1": "OPD top-1, materialised",
    "opd_topk": "OPD top-k, materialised",
    "opd_full": "OPD full, materialised",
    "opd_top1_chunked": "OPD top-1, chunked",
    "opd_topk_chunked": "OPD top-k, chunked",
    "opd_full_chunked": "OPD full, chunked",
    "logprob": "log-prob forward",
}
"""Everything that can be measured and predicted, with its title in tables."""


@dataclass(frozen=True)
class Moment:
    """The memory at one point of the update, beyond the resident memory: bytes by name."""

    name: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of the terms, in bytes."""
        return sum(self.terms.values())


def predict(objective: str, shape: Shape, update: Update) -> Moment:
    """Return the moment at which the update's memory peaks; its total is the delta-peak.

    Args:
        objective: one of `TITLES`.

    Raises:
        ValueError: for an unknown objective.
    """
    return max(moments(objective, shape, update), key=lambda moment: moment.total)


def moments(objective: str, shape: Shape, update: Update) -> list[Moment]:
    """Return every moment at which memory can peak, in order.

    Raises:
        ValueError: for an unknown objective.
    """
    if objective not in TITLES:
        raise ValueError(f"objective must be one of {', '.join(TITLES)}; got {objective!r}")
    n, e, d = update.all_tokens, update.dtype_bytes, shape.d
    states = n * d * update.stream
    head = shape.vocab * d * e
    root = _gathered_root(shape, update)
    if objective == "logprob":
        mlp = {"one block's MLP": 3 * n * shape.intermediate * e}
        return [Moment("blocks", mlp | root | _gathered_block(shape, update))] + [
            Moment(name, {"final states": states} | root | terms)
            for name, terms in _logprob_moments(shape, update)
        ]
    stored = _stored(objective, shape, update) | root
    peaks = [Moment("end of the forward", stored)]
    calls_head = objective.startswith("opd")
    kept_head = {}
    if calls_head:
        chunked = objective.endswith("_chunked")
        of_loss = _chunked_moments if chunked else _materialised_moments
        form = objective.removesuffix("_chunked").removeprefix("opd_")
        peaks += [Moment(name, stored | terms) for name, terms in of_loss(form, shape, update)]
        if (
            shape.tied or update.shards > 1
        ):  # held until the embedding's gradient or the reduce-scatter
            kept_head = {"head's weight gradient": head}
    done = (
        {"final norm"} if calls_head or objective == "backbone" else {"final norm", "final states"}
    )
    left = {name: size for name, size in stored.items() if name not in done} | kept_head
    peaks.append(Moment("backward of a block", left | _block_backward(shape, update)))
    if update.shards > 1:
        peaks += _reduced_blocks(shape, update, left)
    embedding = {"embedding's weight gradient": head, "gradient of states": states}
    if shape.tied and calls_head and not objective.endswith("_chunked"):
        # The head's gradient is a transposed view, which autograd does not add to in place.
        embedding["sum of both weight gradients"] = head
    peaks.append(Moment("backward of the embedding", embedding | kept_head | root))
    if update.shards > 1:
        tables = 1 if shape.tied or not calls_head else 2
        grads = tables * shape.vocab * d * _reduced(update)
        peaks.append(
            Moment(
                "reduce-scatter of the root",
                {"embedding's and head's gradients in reduce-scatter": grads},
            )
        )
    return peaks


def _stored(objective: str, shape: Shape, update: Update) -> dict[str, int]:
    """Return the memory that the forward leaves for the backward."""
    n, d, layers, e = update.all_tokens, shape.d, shape.layers, update.stream
    terms = {"final norm": n * (FLOAT32 * d + e * d + FLOAT32), "final states": n * d * e}
    if update.checkpointing:
        terms["checkpoints"] = layers * n * d * e
        if update.span:
            terms["attention mask"] = n * update.span * (update.dtype_bytes if update.eager else 1)
    else:
        terms["activations"] = layers * n * shape.block_activations(update)
    if objective in ("oprd", "bridge"):
        terms["rep rows' statistics"] = layers * update.rows * 16
        if e < FLOAT32 and not update.checkpointing:
            # The block outputs. In float32, the next norm or the checkpoints keep them anyway.
            terms["states at the taps"] = (layers - 1) * n * d * e
    return terms


def _block_backward(shape: Shape, update: Update) -> dict[str, int]:
    """Return the additional memory in the backward of one block, which peaks in its MLP."""
    n, e, d, wide = update.all_tokens, update.dtype_bytes, shape.d, shape.intermediate
    # The peak is either at the product of gate and up (three gradients, the down projection's input
    # is freed) or at the down projection (one gradient and that of its weight).
    terms = {
        "gradients in the MLP": max(2 * n * wide * e, n * wide * e + d * wide * e),
        "gradient of states": 2 * n * d * update.stream,
    }
    if update.checkpointing:
        terms["recomputed activations"] = n * shape.block_activations(update)
    return terms | _gathered_block(shape, update)


def _reduced_blocks(shape: Shape, update: Update, left: dict[str, int]) -> list[Moment]:
    """Return the moments during and after the reduce-scatter of the last block's gradients.

    The backward of the block before it still holds the buffer that was sent.
    """
    per_layer = {"checkpoints", "activations", "states at the taps"}
    left = {
        name: size * (shape.layers - 1) // shape.layers if name in per_layer else size
        for name, size in left.items()
    }
    size, name = shape.block_parameters, "block's gradients in reduce-scatter"
    reduced = {
        "gradient of states": update.all_tokens * shape.d * update.stream,
        "gathered weights, next block": size * update.gathered,
        name: size * _reduced(update),
    }
    peaks = [Moment("reduce-scatter of a block", left | reduced)]
    if shape.layers > 1:
        down = shape.d * shape.intermediate * update.gathered
        held = {name: size * update.reduced_bytes, "down projection's weight gradient": down}
        block = _block_backward(shape, update)
        peaks.append(Moment("backward of the next block", left | block | held))
    return peaks


def _reduced(update: Update) -> int:
    """Return the bytes per gradient during a reduce-scatter: input, buffer and shard."""
    return update.gathered + update.reduced_bytes + update.reduced_bytes // update.shards


def _gathered_block(shape: Shape, update: Update) -> dict[str, int]:
    if update.shards == 1:
        return {}
    # The current block and the prefetched next one.
    return {"gathered weights, two blocks": 2 * shape.block_parameters * update.gathered}


def _gathered_root(shape: Shape, update: Update) -> dict[str, int]:
    if update.shards == 1:
        return {}
    tables = 1 if shape.tied else 2
    size = tables * shape.vocab * shape.d * update.gathered
    return {"gathered weights, embedding and head": size}


Terms = Iterator[tuple[str, dict[str, int]]]


def _row_copies(shape: Shape, update: Update) -> Terms:
    """Yield the moment of [B, T, V] logits and their supervised rows in float32, if e is less."""
    n, e, v = update.all_tokens, update.dtype_bytes, shape.vocab
    rows = update.rows * v * FLOAT32
    logits = {"logits [B,T,V]": n * v * e}
    if e < FLOAT32:
        copies = {"float32 copy of logits": n * v * FLOAT32, "rows of logits, float32": rows}
        yield "float32 logits", logits | copies


def _logprob_moments(shape: Shape, update: Update) -> Terms:
    yield from _row_copies(shape, update)
    rows = update.rows * shape.vocab * FLOAT32
    yield (
        "log-softmax",
        {
            "logits [B,T,V]": update.all_tokens * shape.vocab * update.dtype_bytes,
            "rows of logits, float32": rows,
            "exponentials of log-sum-exp": rows,
        },
    )


def _materialised_moments(form: str, shape: Shape, update: Update) -> Terms:
    """Yield the moments of `oprd.distill.vocab_losses.materialised` and its backward."""
    n, e, v, d = update.all_tokens, update.dtype_bytes, shape.vocab, shape.d
    x = update.rows * v * FLOAT32
    logits = {"logits [B,T,V]": n * v * e}
    both = {"rows of logits, float32": x, "teacher's rows, float32": x}
    if e < FLOAT32:
        copy = {"float32 copy of the teacher's logits": n * v * FLOAT32}
        yield "float32 logits", logits | both | copy
    if form == "full":
        wide = {"log-softmax, student and teacher": 2 * x, "p, log p - log q, their product": 3 * x}
        yield "loss", logits | both | wide
        yield "loss backward", {"log-softmax, p, log p - log q": 3 * x, "their gradients": 2 * x}
    else:
        yield "loss", logits | both | {"exponentials of log-sum-exp": x}
        grads = {"exponentials and gradients of log-sum-exp": 3 * x}
        yield "loss backward", {"rows of logits, float32": x} | grads
    gradient = {"gradient of logits, float32": n * v * FLOAT32}
    yield "gradient of the rows", {"gradient of the rows": x} | gradient
    if e < FLOAT32:
        yield "gradient narrowed", gradient | {"gradient of logits": n * v * e}
    yield (
        "head backward",
        {
            "gradient of logits": n * v * e,
            "head's weight gradient": v * d * e,
            "gradient of states": n * d * e,
        },
    )


def _chunked_moments(form: str, shape: Shape, update: Update) -> Terms:
    """Yield the moments of `oprd.distill.vocab_losses.chunked`; its forward computes gradients."""
    e, v, d, m = update.dtype_bytes, shape.vocab, shape.d, update.rows
    rows = min(update.chunk, m)
    x = rows * v * FLOAT32
    kept = {
        "rows of states and their gradient": 2 * m * d * e,
        "head's weight gradient, float32": v * d * FLOAT32,
    }
    if e < FLOAT32 and update.widen_head:
        kept["float32 copies of the heads"] = 2 * v * d * FLOAT32
    # The last chunk's gradient is freed only when the next one replaces it.
    terms = {"chunk's logits, student and teacher": 2 * x}
    if m > rows:
        terms["last chunk's gradient"] = x
    if form == "full":
        terms["chunk's log-softmax, p, log p - log q, gradients"] = 6 * x
    else:
        terms["chunk's exponentials and gradients of log-sum-exp"] = 3 * x
    yield "loss in a chunk", kept | terms
    if e < FLOAT32:
        yield "gradients narrowed", kept | {"head's weight gradient": v * d * e}


def resident(shape: Shape, update: Update, teacher_bytes: int, ready_bytes: int) -> dict[str, int]:
    """Return the bytes that are resident before the update begins, by name.

    Args:
        teacher_bytes: bytes of the teacher's weights, 0 if it shares the student's.
        ready_bytes: bytes of the teacher's outputs.
    """
    weights = shape.parameters * update.dtype_bytes // update.shards
    return {
        "student's weights": weights,
        "student's gradients": weights,
        "teacher's weights": teacher_bytes,
        "teacher's outputs": ready_bytes,
    }


def teacher_rows(objective: str, shape: Shape, update: Update, rank: int) -> int:
    """Return the bytes of the teacher's outputs that an update of this objective reads."""
    m, e = update.rows, update.dtype_bytes
    if objective == "bridge":
        return shape.layers * m * rank * FLOAT32
    sizes = {
        "states": shape.layers * m * shape.d * e,
        "last": m * shape.d * e,
        "logits": update.all_tokens * shape.vocab * e,
        None: 0,
    }
    return sizes[TEACHER_FORWARD.get(objective)]


TEACHER_FORWARD = {
    "oprd": "states",
    "bridge": "states",
    "oprd_last": "last",
    "opd_top1": "logits",
    "opd_topk": "logits",
    "opd_full": "logits",
    "opd_top1_chunked": "last",
    "opd_topk_chunked": "last",
    "opd_full_chunked": "last",
}
"""The teacher's outputs for each objective: the supervised rows of every block's states
(``states``), those of the last block (``last``), or ``logits``."""


def reads_teacher_logits(objective: str) -> bool:
    """Return whether the update reads the teacher's [B, T, V] logits."""
    return TEACHER_FORWARD.get(objective) == "logits"


def ready_bytes(objectives: list[str], shape: Shape, update: Update, rank: int) -> int:
    """Return the bytes of the teacher's outputs while these objectives are measured.

    They are each block's rows, plus projected states and logits if an objective reads them.
    """
    size = teacher_rows("oprd", shape, update, rank)
    if "bridge" in objectives:
        size += teacher_rows("bridge", shape, update, rank)
    if any(map(reads_teacher_logits, objectives)):
        size += teacher_rows("opd_full", shape, update, rank)
    return size
