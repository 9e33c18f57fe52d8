"""Checks that a student and a teacher are compatible."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from oprd.errors import ConfigError
from oprd.models.info import model_info
from oprd.models.layer_pairs import LayerSpec, pair_layers


def check_pair(
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    layers: LayerSpec,
    bridged: bool = False,
) -> list[tuple[int, int]]:
    """Check that OPRD can compare two models, and return their layer pairs.

    Args:
        layers: student layers, as ``distill.layers``.
        bridged: True if a bridge is used, so that the widths may differ.

    Raises:
        ConfigError: if the widths differ and there is no bridge, or if ``layers`` can't be paired
            (see `pair_layers`).
    """
    s, t = model_info(student), model_info(teacher)
    if not bridged and s.width != t.width:
        raise ConfigError(
            f"the student is {s.width} wide and the teacher {t.width}: without a bridge, OPRD "
            "compares equal widths only. Fit a bridge with oprd-bridge fit and pass it as "
            "bridge.path, or choose a teacher of the student's width"
        )
    assert s.layers is not None
    assert t.layers is not None
    try:
        pairs = pair_layers(layers, s.layers, t.layers)
    except ValueError as error:
        raise ConfigError(f"distill.layers: {error}") from error
    return pairs


def shares_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Return whether the student's token ids mean the same to the teacher.

    The teacher may have more tokens behind the student's (Qwen3 has ``<think>``, Qwen2.5 has not).
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if any(theirs.get(token) != number for token, number in ours.items()):
        return False
    more = theirs.keys() - ours.keys()
    return all(theirs[token] > max(ours.values()) for token in more)


def shared_ids(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int | None:
    """Return the number of ids that both models have, if the teacher has more tokens; else None."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    return None if len(ours) == len(theirs) else 1 + max(ours.values())


def left_out(config: PretrainedConfig) -> list[str]:
    """Return the parts of a multimodal model that are not loaded with its language model.

    Of some families, transformers loads the language model alone as a causal LM.
    """
    parts = {name.removesuffix("_config") for name in type(config).sub_configs} - {"text"}
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not parts or loaded is None or isinstance(config, loaded.config_class or object):
        return []
    return sorted(parts)


def check_vocabularies(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    teacher_config: PretrainedConfig,
) -> None:
    """Check that every token id of the student means the same to the teacher.

    The teacher may have more tokens. Embedding tables may be padded to different sizes (for example
    151,936 and 152,064 rows for the same tokenizer).

    Raises:
        ConfigError: if ids name different tokens, or if the teacher's embedding table is too small
            for the student's ids. The message says how the vocabularies differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    rows = teacher_config.get_text_config().vocab_size
    if not shares_ids(student, teacher):
        only_ours, only_theirs = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
        moved = [t for t in ours.keys() & theirs.keys() if ours[t] != theirs[t]]
        parts = [f"{len(ours)} and {len(theirs)} tokens"]
        for what, tokens in [
            ("only the student has", only_ours),
            ("only the teacher has", only_theirs),
        ]:
            if tokens:
                parts.append(f"{what} {len(tokens)}, e.g. {sorted(tokens)[:3]}")
        if moved:
            example = sorted(moved)[0]
            parts.append(
                f"{len(moved)} have other ids, e.g. {example!r}: {ours[example]} and "
                f"{theirs[example]}"
            )
        raise ConfigError(
            "student and teacher have different vocabularies, so the student's token ids would "
            f"mean something else to the teacher: {'; '.join(parts)}. Choose a teacher that shares "
            "the student's tokenizer"
        )
    largest = max(ours.values())
    if largest >= rows:
        raise ConfigError(
            f"the teacher's embedding table has {rows} rows, too few for token id {largest} "
            f"({student.convert_ids_to_tokens(largest)!r}) of the shared tokenizer"
        )


def check_student_ids(student: PreTrainedTokenizerBase, teacher: PretrainedConfig) -> None:
    """Check that the student's token ids are within a teacher's embedding table.

    Raises:
        ConfigError: if they are not.
    """
    rows, largest = teacher.get_text_config().vocab_size, max(student.get_vocab().values())
    if largest >= rows:
        raise ConfigError(
            f"teacher.reads=student_ids: the student's token id {largest} is beyond the teacher's "
            f"{rows} embedding rows: use teacher.reads=text"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a text model, or None if it has no limit.

    Rope scaling (YaRN, ..) stretches those of ``original_max_position_embeddings``. Without it,
    ``max_position_embeddings`` may be the number before or after; the larger is taken.
    """
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if (
        limit is None
        or not isinstance(rope, dict)
        or not isinstance(rope.get("factor"), int | float)
    ):
        return limit
    original = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(original * rope["factor"]))


def check_length(
    config: PretrainedConfig,
    prompt_tokens: int,
    new_tokens: int,
    who: str,
    context_length: int | None = None,
) -> None:
    """Check that the longest prompt and response fit into the model's positions.

    Args:
        config: the model's configuration.
        context_length: the number of positions, if it is not the configuration's.
        prompt_tokens, new_tokens: maximum length of a prompt and of a response.
        who: "student" or "teacher", for the error message.

    Raises:
        ConfigError: if they don't fit.
    """
    limit = context_length or positions_of(config.get_text_config())
    model, _, source = who.partition(" of ")
    option = f"teachers.{source}" if source else model
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the {limit} positions "
            f"of the {who}: lower data.max_prompt_tokens or max_new_tokens, or if the model can "
            f"read more than its configuration says, set {option}.context_length"
        )
