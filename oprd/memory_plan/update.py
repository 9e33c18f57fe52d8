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

from oprd.memory_plan.objectives import PLANNER_OBJECTIVES, LossForm, Objective
from oprd.memory_plan.shapes import FLOAT32, Shape, Update


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
        objective: one of `PLANNER_OBJECTIVES`.

    Raises:
        ValueError: for an unknown objective.
    """
    return max(moments(objective, shape, update), key=lambda moment: moment.total)


def moments(objective: str, shape: Shape, update: Update) -> list[Moment]:
    """Return every moment at which memory can peak, in order.

    Raises:
        ValueError: for an unknown objective.
    """
    if objective not in PLANNER_OBJECTIVES:
        raise ValueError(
            f"objective must be one of {', '.join(PLANNER_OBJECTIVES)}; got {objective!r}"
        )
    chosen = PLANNER_OBJECTIVES[objective]
    if not chosen.has_backward:
        return _forward_alone(shape, update)
    stored = _stored(chosen, shape, update) | _gathered_root(shape, update)
    held_head = _held_head_gradient(chosen, shape, update)
    return [
        Moment("end of the forward", stored),
        *_loss(chosen, stored, shape, update),
        *_blocks_backward(_left_to_blocks(chosen, stored) | held_head, shape, update),
        *_root_backward(chosen, held_head, shape, update),
    ]


def _forward_alone(shape: Shape, update: Update) -> list[Moment]:
    """Return the moments of a forward without gradients that computes log-probs."""
    root = _gathered_root(shape, update)
    mlp = {"one block's MLP": 3 * update.all_tokens * shape.intermediate * update.dtype_bytes}
    states = {"final states": update.all_tokens * shape.d * update.stream}
    return [
        Moment("blocks", mlp | root | _gathered_block(shape, update)),
        *(Moment(name, states | root | terms) for name, terms in _logprob_moments(shape, update)),
    ]


def _stored(chosen: Objective, shape: Shape, update: Update) -> dict[str, int]:
    """Return the memory that the forward leaves for the backward."""
    n, d, layers, e = update.all_tokens, shape.d, shape.layers, update.stream
    terms = {"final norm": n * (FLOAT32 * d + e * d + FLOAT32), "final states": n * d * e}
    recomputed = update.recomputed(layers)
    kept = layers - recomputed
    if recomputed:
        terms["checkpoints"] = recomputed * n * d * e
        if update.span:
            terms["attention mask"] = n * update.span * (update.dtype_bytes if update.eager else 1)
    if kept:
        terms["activations"] = kept * n * shape.block_activations(update)
    if chosen.taps == "all":
        terms["rep rows' statistics"] = layers * update.rows * 16
        if e < FLOAT32 and kept:
            # The block outputs. In float32, the next norm or the checkpoints keep them anyway.
            terms["states at the taps"] = min(kept, layers - 1) * n * d * e
    return terms


def _loss(
    chosen: Objective, stored: dict[str, int], shape: Shape, update: Update
) -> Iterator[Moment]:
    """Yield the moments of a loss on logits, forward and backward."""
    if chosen.loss is not None:
        if chosen.is_chunked:
            found = _chunked_moments(chosen.loss, shape, update)
        else:
            found = _materialised_moments(chosen.loss, shape, update)
        for name, terms in found:
            yield Moment(name, stored | terms)


def _held_head_gradient(chosen: Objective, shape: Shape, update: Update) -> dict[str, int]:
    """Return the head's weight gradient if it is held until the end of the backward.

    It waits for the gradient of the embedding, if that is the same table, or for the
    reduce-scatter.
    """
    if chosen.loss is None or not (shape.tied or update.shards > 1):
        return {}
    return {"head's weight gradient": shape.vocab * shape.d * update.dtype_bytes}


def _left_to_blocks(chosen: Objective, stored: dict[str, int]) -> dict[str, int]:
    """Return what of the stored memory is left when the backward reaches the last block."""
    done = ("final norm",) if chosen.taps is None else ("final norm", "final states")
    return {name: size for name, size in stored.items() if name not in done}


def _blocks_backward(left: dict[str, int], shape: Shape, update: Update) -> Iterator[Moment]:
    """Yield the moments of the backward of the last blocks, which has ``left`` beside it."""
    all_recomputed = update.recomputed(shape.layers) == shape.layers
    yield Moment("backward of a block", left | _block_backward(shape, update, all_recomputed))
    if update.shards > 1:
        yield from _reduced_blocks(shape, update, left)


def _root_backward(
    chosen: Objective, held_head: dict[str, int], shape: Shape, update: Update
) -> Iterator[Moment]:
    """Yield the moments of the embedding's backward and of the reduce-scatter after it."""
    table = shape.vocab * shape.d
    embedding = {
        "embedding's weight gradient": table * update.dtype_bytes,
        "gradient of states": update.all_tokens * shape.d * update.stream,
    }
    if shape.tied and chosen.is_materialised:
        # The head's gradient is a transposed view, which autograd does not add to in place.
        embedding["sum of both weight gradients"] = table * update.dtype_bytes
    root = _gathered_root(shape, update)
    yield Moment("backward of the embedding", embedding | held_head | root)
    if update.shards > 1:
        tables = 1 if shape.tied or chosen.loss is None else 2
        reduced = {
            "embedding's and head's gradients in reduce-scatter": tables * table * _reduced(update)
        }
        yield Moment("reduce-scatter of the root", reduced)


def _block_backward(shape: Shape, update: Update, is_recomputed: bool) -> dict[str, int]:
    """Return the additional memory in the backward of one block, which peaks in its MLP."""
    n, e, d, wide = update.all_tokens, update.dtype_bytes, shape.d, shape.intermediate
    # The peak is either at the product of gate and up (three gradients, the down projection's input
    # is freed) or at the down projection (one gradient and that of its weight).
    terms = {
        "gradients in the MLP": max(2 * n * wide * e, n * wide * e + d * wide * e),
        "gradient of states": 2 * n * d * update.stream,
    }
    if is_recomputed:
        terms["recomputed activations"] = n * shape.block_activations(update)
    return terms | _gathered_block(shape, update)


def _reduced_blocks(shape: Shape, update: Update, left: dict[str, int]) -> list[Moment]:
    """Return the moments during and after the reduce-scatter of the last block's gradients.

    The backward of the block before it still holds the buffer that was sent.
    """
    kept = shape.layers - update.recomputed(shape.layers)
    of_blocks = dict.fromkeys(("activations", "states at the taps"), kept)
    if not kept:
        of_blocks["checkpoints"] = shape.layers
    left = {
        name: size * (of_blocks[name] - 1) // of_blocks[name] if name in of_blocks else size
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
        block = _block_backward(shape, update, kept <= 1)
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


def _materialised_moments(form: LossForm, shape: Shape, update: Update) -> Terms:
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


def _chunked_moments(form: LossForm, shape: Shape, update: Update) -> Terms:
    """Yield the moments of `oprd.distill.chunked`, whose forward computes gradients."""
    e, v, d, m = update.dtype_bytes, shape.vocab, shape.d, update.rows
    rows = min(update.chunk, m)
    x = rows * v * FLOAT32
    kept = {
        "rows of states and their gradient": 2 * m * d * e,
        "head's weight gradient, float32": v * d * FLOAT32,
    }
    if e < FLOAT32 and update.widen_head:
        kept["float32 copies of the heads"] = 2 * v * d * FLOAT32
    if form == "topk_set":
        yield "loss in a chunk", kept | {"chunk's logits of one model": x}
        of_set = rows * update.k * d * FLOAT32
        yield "gradient in a chunk", kept | {"weights of the set, and their gradient": 2 * of_set}
    else:
        terms = {"chunk's logits, student and teacher": 2 * x}
        if update.widen_head:  # on a CPU
            terms["exponentials of log-sum-exp"] = x
        elif e < FLOAT32:
            terms["their gradient, narrowed"] = rows * v * e
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
    chosen = PLANNER_OBJECTIVES[objective]
    if chosen.is_projected:
        return shape.layers * m * rank * FLOAT32
    sizes = {
        "states": shape.layers * m * shape.d * e,
        "last": m * shape.d * e,
        "logits": update.all_tokens * shape.vocab * e,
        None: 0,
    }
    return sizes[chosen.teacher_outputs]


def ready_bytes(objectives: list[str], shape: Shape, update: Update, rank: int) -> int:
    """Return the bytes of the teacher's outputs while these objectives are measured.

    They are each block's rows, plus projected states and logits if an objective reads them.
    """
    size = teacher_rows("oprd", shape, update, rank)
    if "bridge" in objectives:
        size += teacher_rows("bridge", shape, update, rank)
    if any(PLANNER_OBJECTIVES[name].is_materialised for name in objectives):
        size += teacher_rows("opd_full", shape, update, rank)
    return size
