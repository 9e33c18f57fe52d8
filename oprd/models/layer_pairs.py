"""Which layers are compared, and which teacher layer stands beside which student layer.

Layers are counted as blocks, 0 .. L-1. What is compared for block i is entry i + 1 of Hugging
Face's ``hidden_states``: the block's raw output, except for the last block, whose entry is taken
after the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence

LayerSpec = str | Sequence[int]
"""``"last"``, ``"all"``, ``"even"`` (blocks 0, 2, ..), ``"odd"`` (1, 3, ..) or a list of blocks."""


def select_layers(spec: LayerSpec, num_layers: int) -> list[int]:
    """The blocks that ``spec`` names, in ascending order.

    Raises:
        ValueError: for an unknown word, an empty list, a repeated or out-of-range block.
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
    """The teacher block beside student block ``block``, by relative depth (Eq. 11).

    With l = block + 1: phi(l) = round((l - 1) / (L_S - 1) * (L_T - 1)) + 1, halves up; the last
    stands beside the last, and a one-layer student beside the teacher's last.
    """
    if student_layers == 1:
        return teacher_layers - 1
    spans = student_layers - 1
    return (2 * block * (teacher_layers - 1) + spans) // (2 * spans)


def pair_layers(spec: LayerSpec, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """(student block, teacher block) for every selected layer. The correspondence is made on the
    full stacks and only then selected from.

    Raises:
        ValueError: as `select_layers`; or if two selected layers would be matched to one layer of
            a shallower teacher.
    """
    pairs = [
        (block, corresponding_layer(block, student_layers, teacher_layers))
        for block in select_layers(spec, student_layers)
    ]
    if len({teacher for _, teacher in pairs}) < len(pairs):
        raise ValueError(
            f"{len(pairs)} student layers are asked for, but the teacher, with {teacher_layers} "
            f"layers to the student's {student_layers}, would stand for several at once: "
            f"{pairs}. Name fewer layers, for example layers='last' or "
            f"layers={_distinct(student_layers, teacher_layers)}"
        )
    return pairs


def _distinct(student_layers: int, teacher_layers: int) -> list[int]:
    """The deepest student block for each teacher block."""
    deepest = {
        corresponding_layer(b, student_layers, teacher_layers): b for b in range(student_layers)
    }
    return sorted(deepest.values())
