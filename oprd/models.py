"""Loading models and tokenizers, and checking that a pair fits together."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from oprd.bridge.bank import BridgeInfo, ModelInfo, fingerprint
from oprd.config import StudentConfig, TeacherConfig
from oprd.errors import ConfigError, Unreachable, is_unreachable
from oprd.layers import LayerSpec, pair_layers

DEMO = Path(__file__).parent / "demo"


def demo_path(path: str) -> str:
    """``demo:NAME`` is a file or directory that comes with the package."""
    return str(DEMO / path.removeprefix("demo:")) if path.startswith("demo:") else path


def teacher_path(teacher: TeacherConfig, student: StudentConfig) -> str:
    """Where a teacher's files are: the student's, if that teaches itself."""
    return student.path if teacher.is_self else teacher.path


def load_config(path: str) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        ConfigError: if there is none at ``path``.
    """
    try:
        return AutoConfig.from_pretrained(demo_path(path))
    except (OSError, ValueError) as error:
        raise _not_loadable("model", path, error) from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer; its padding token falls back to EOS.

    Raises:
        ConfigError: if there is none at ``path``, or it has no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(demo_path(path))
    except (OSError, ValueError) as error:
        raise _not_loadable("tokenizer", path, error) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {path} has no EOS token: responses could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _not_loadable(what: str, path: str, error: Exception) -> ConfigError:
    place = demo_path(path)
    if Path(place).is_dir():
        return ConfigError(f"the {what} in {place} can't be loaded: {error}")
    kind = Unreachable if is_unreachable(error) else ConfigError
    return kind(
        f"no {what} at {path!r}: it is not a directory on this machine, and loading it from the "
        f"hub failed: {str(error).splitlines()[0]}"
    )


def load_model(
    cfg: StudentConfig | TeacherConfig, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A causal LM in evaluation mode.

    Raises:
        ConfigError: if there is none at its path.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            demo_path(cfg.path),
            dtype=getattr(torch, cfg.dtype),
            attn_implementation=cfg.attn_implementation,
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_loadable("model", cfg.path, error) from error
    return model.to(device).eval()


def unwritten_model(
    config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A causal LM on the CPU whose weights and buffers hold nothing yet and, until they are
    written, take no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


def empty_model(cfg: StudentConfig | TeacherConfig) -> PreTrainedModel:
    """The model that `load_model` would load, as an `unwritten_model`.

    Raises:
        ConfigError: as `load_config`.
    """
    dtype = getattr(torch, cfg.dtype)
    model = unwritten_model(load_config(cfg.path), dtype, cfg.attn_implementation)
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(demo_path(cfg.path))
    return model.eval()


def model_info(
    config: PretrainedConfig,
    path: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ModelInfo:
    """A model as bridges know it."""
    text = config.get_text_config()
    vocabulary = None if tokenizer is None else fingerprint(tokenizer.get_vocab())
    return ModelInfo(text.hidden_size, text.num_hidden_layers, path, vocabulary)


def check_pair(
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    layers: LayerSpec,
    bridge: BridgeInfo | None = None,
) -> list[tuple[int, int]]:
    """The layer pairs of two models that OPRD can compare: plainly, or through a bridge.

    Raises:
        ConfigError: if their widths differ and there is no bridge, the bridge is not theirs, or the
            layers asked for don't exist.
    """
    s, t = model_info(student), model_info(teacher)
    if bridge is None and s.width != t.width:
        raise ConfigError(
            f"the student is {s.width} wide and the teacher {t.width}: without a bridge, OPRD "
            "compares equal widths. Fit one with oprd-bridge fit and pass it as bridge.path, or "
            "choose a teacher of the student's width"
        )
    assert s.layers is not None
    assert t.layers is not None
    try:
        pairs = pair_layers(layers, s.layers, t.layers)
    except ValueError as error:
        raise ConfigError(f"distill.layers: {error}") from error
    if bridge is not None:
        bridge.check(s, t, pairs)
    return pairs


def same_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether every token id means the same to both, so that no alignment is needed."""
    return student.get_vocab() == teacher.get_vocab()


def check_vocabularies(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    teacher_config: PretrainedConfig,
) -> None:
    """The teacher reads the student's token ids: every one must mean the same to both.

    Embedding tables padded to different sizes (151,936 and 152,064 rows for the same tokenizer,
    say) are no obstacle; a table too small for the student's ids, or ids that name other tokens,
    are.

    Raises:
        ConfigError: saying how they differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    rows = teacher_config.get_text_config().vocab_size
    if not same_vocabulary(student, teacher):
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
    """Check that a teacher with another tokenizer can be fed the student's token ids at all.

    Raises:
        ConfigError: if they go beyond its embedding table.
    """
    rows, largest = teacher.get_text_config().vocab_size, max(student.get_vocab().values())
    if largest >= rows:
        raise ConfigError(
            f"teacher.reads=student_ids: the student's token id {largest} is beyond the teacher's "
            f"{rows} embedding rows: use reads=text"
        )


def check_length(config: PretrainedConfig, prompt_tokens: int, new_tokens: int, who: str) -> None:
    """Check that the longest prompt and response fit the model's positions.

    Raises:
        ConfigError: if they don't.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise ConfigError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones exceed the {limit} positions "
            f"of the {who}: lower data.max_prompt_tokens or the max_new_tokens"
        )


def copy_lm_head(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Give the student the teacher's LM head.

    Raises:
        ConfigError: if the heads differ in shape, or the student's is tied to its embeddings.
    """
    ours, theirs = student.get_output_embeddings(), teacher.get_output_embeddings()
    if ours.weight is student.get_input_embeddings().weight:
        raise ConfigError(
            "distill.init_head_from_teacher: the student's head is tied to its embeddings, which "
            "OPRD trains: leave the option off"
        )
    if ours.weight.shape != theirs.weight.shape:
        raise ConfigError(
            f"distill.init_head_from_teacher: the student's head is {tuple(ours.weight.shape)}, "
            f"the teacher's {tuple(theirs.weight.shape)}: they must be alike"
        )
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
        if getattr(ours, "bias", None) is not None and getattr(theirs, "bias", None) is not None:
            ours.bias.copy_(theirs.bias)
