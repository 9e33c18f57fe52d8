"""Selection of the student layers to compare, and of the teacher layer paired with each.

Layers are counted as blocks, 0 .. L-1. The state compared for block i is entry i + 1 of Hugging
Face's ``hidden_states``: the block's raw output, or for the last block the output of the final
norm.
"""

from __future__ import annotations

from collections.abc import Sequence

LayerSpec = str | Sequence[int]
"""``"last"``, ``"all"``, ``"even"`` (blocks 0, 2, ..), ``"odd"`` (1, 3, ..) or a list of blocks."""


def select_layers(spec: LayerSpec, num_layers: int) -> list[int]:
    """Return the blocks that ``spec`` names, in ascending order.

    Raises:
        ValueError: if ``spec`` is an unknown word or selects no block, or if it lists a block twice
            or one that is out of range.
    """
    if isinstance(spec, str):
        words = {
            "last": [num_layers - 1],
            "all": list(range(num_layers)),
            "even": list(range(0, num_layers, 2)),
            "odd": list(range(1, num_layers, 2)),
        }
        if spec not in words:
            raise ValueError(
                f"layers must be one of {list(words)} or a list of blocks, got {spec!r}"
            )
        blocks = words[spec]
        if not blocks:
            raise ValueError(f"layers={spec!r} selects nothing in a model of {num_layers} layer(s)")
        return blocks
    blocks = list(spec)
    if not blocks:
        raise ValueError("layers is an empty list: name at least one block")
    for block in blocks:
        if not 0 <= block < num_layers:
            raise ValueError(
                f"layers names block {block}, but the student has {num_layers} layers: blocks are "
                f"counted 0 .. {num_layers - 1}"
            )
    if len(set(blocks)) != len(blocks):
        raise ValueError(f"layers names a block twice: {blocks}")
    return sorted(blocks)


def corresponding_layer(block: int, student_layers: int, teacher_layers: int) -> int:
    """Return the teacher block paired with student block ``block``, by relative depth (Eq. 11).

    With l = block + 1: phi(l) = round((l - 1) / (L_S - 1) * (L_T - 1)) + 1, halves rounded up. The
    student's last block is paired with the teacher's last block, also if the student has only one
    layer.
    """
    if student_layers == 1:
        return teacher_layers - 1
    spans = student_layers - 1
    return (2 * block * (teacher_layers - 1) + spans) // (2 * spans)


def pair_layers(spec: LayerSpec, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Return (student block, teacher block) for every selected layer.

    The correspondence is that of the full models; it does not depend on which layers are selected.

    Raises:
        ValueError: see `select_layers`; also if two selected layers would be paired with the same
            layer of a shallower teacher.
    """
    pairs = [
        (block, corresponding_layer(block, student_layers, teacher_layers))
        for block in select_layers(spec, student_layers)
    ]
    if len({teacher for _, teacher in pairs}) < len(pairs):
        raise ValueError(
            f"{len(pairs)} student layers are selected, but a layer of the teacher, with "
            f"{teacher_layers} layers to the student's {student_layers}, would be paired with "
            f"several at once: {pairs}. Select fewer layers, for example layers='last' or "
            f"layers={_distinct(student_layers, teacher_layers)}"
        )
    return pairs


def _distinct(student_layers: int, teacher_layers: int) -> list[int]:
    """Return the deepest student block paired with each teacher block."""
    deepest = {
        corresponding_layer(b, student_layers, teacher_layers): b for b in range(student_layers)
    }
    return sorted(deepest.values())
