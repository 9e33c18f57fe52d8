"""Checks, by running a model on a few random tokens, that it is built as OPRD assumes.

The states that OPRD compares are those that hooks see at the blocks and at the final norm. They
must be what the model itself calls its hidden states, one (B, T, d) tensor a block, or the loss
would compare other things at other tokens.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from oprd.distributed.fsdp import check_no_shared_weights, input_device, reshard
from oprd.errors import ConfigError
from oprd.models.decoder import Decoder, cut, find_decoder, watch
from oprd.models.lm_head import HeadRows, LMHead

logger = logging.getLogger(__name__)

ROWS, TOKENS = 2, 5
"""Shape of the batch. No dimension of a model is likely to have these sizes."""


def random_ids(decoder: Decoder) -> Tensor:
    """Return token ids (ROWS, TOKENS), without changing the run's own random state."""
    vocabulary = decoder.backbone.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=generator)
    return ids.to(input_device(decoder.root))


@contextmanager
def _evaluating(decoder: Decoder) -> Iterator[None]:
    """Without dropout, as in a teacher's forward pass."""
    modes = [(module, module.training) for module in decoder.backbone.modules()]
    decoder.backbone.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_states(decoder: Decoder, blocks: Sequence[int], depth: int, who: str) -> None:
    """Check that the states of ``blocks`` are the model's own hidden states.

    Args:
        decoder: the model, or its first layers, whose hidden states transformers can't tell: only
            shapes are checked then. If it is sharded, all ranks must call this together.
        blocks, depth: as in `oprd.models.decoder.watch`.
        who: "student" or "teacher", for the error message.

    Raises:
        ConfigError: if a block does not run exactly once, if its states are not (B, T, d), or if
            they are not the entry of ``hidden_states`` that OPRD takes them for.
    """
    name = f"the {who} ({type(decoder.backbone).__name__})"
    every = getattr(decoder.backbone.config, "rescale_every", 0)
    if every and depth >= every:
        raise ConfigError(
            f"{name} halves its states, and changes its weights, at every {every} blocks whenever "
            "it is not training (RWKV): set rescale_every to 0 in its configuration"
        )
    # Asked of a cut decoder, transformers would record the states of shared blocks twice from then
    # on.
    seen, own = _states(decoder, blocks, depth, with_hidden_states=decoder.num_layers == depth)
    shape = (ROWS, TOKENS, decoder.width)
    for block in blocks:
        place = f"block {block}" if block < depth - 1 else f"the final norm {decoder.norm_name!r}"
        found = seen[block]
        if len(found) != 1:
            raise ConfigError(
                f"{name} is not built as OPRD assumes: {place} ran {len(found)} times in one "
                "forward pass, and its states are compared once. Choose other layers, or another "
                "model"
            )
        if found[0].shape != shape:
            raise ConfigError(
                f"{name} is not built as OPRD assumes: the states of {place} have shape "
                f"{tuple(found[0].shape)} for {ROWS} sequences of {TOKENS} tokens, expected {shape}"
            )
        # Mamba's hidden states begin with those of block 0, not with the embeddings.
        if own is not None and not any(_close(found[0], x, 1e-3) for x in own[block : block + 2]):
            raise ConfigError(
                f"{name} is not built as OPRD assumes: the states of {place} are not entry "
                f"{block + 1} of its output_hidden_states (they differ by "
                f"{_difference(found[0], own[block + 1])}). Choose layers without block {block}"
            )


@torch.no_grad()
def same_states(decoder: Decoder, cut: Decoder, blocks: Sequence[int], depth: int) -> bool:
    """Return whether a model that `oprd.models.decoder.cut` has cut computes the same states."""
    if cut is decoder:
        return True
    wanted, _ = _states(decoder, blocks, depth)
    try:
        found, _ = _states(cut, blocks, depth)
    except Exception:  # it needs the blocks that were cut off; what is raised is the model's own
        return False
    return all(
        len(found[block]) == len(wanted[block]) == 1
        and found[block][0].shape == wanted[block][0].shape
        and _close(found[block][0], wanted[block][0], 1e-2)
        for block in blocks
    )


def without_weights(config: PretrainedConfig) -> Decoder:
    """Return the decoder of a model without weights (on the meta device), to run for its shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager"
        )
    return find_decoder(model.eval())


def check_structure(
    config: PretrainedConfig, blocks: Sequence[int], who: str, sharded: bool = False
) -> None:
    """Check by its configuration alone that a model is built as OPRD assumes.

    Nothing is checked of models that do not run without weights.

    Args:
        blocks, who: as in `check_states`.
        sharded: whether FSDP2 will shard the model.

    Raises:
        ConfigError: see `check_states`; also for a model without a known decoder.
    """
    try:
        decoder = without_weights(config)
        if sharded:
            check_no_shared_weights(decoder.layers)
        check_states(decoder, blocks, decoder.num_layers, who)
    except ConfigError:
        raise
    except Exception as error:  # if it is the model's own, loading its weights will tell
        logger.debug(f"the {who} does not run without weights: {error}")


@functools.cache
def _warn_not_cut(name: str, num_layers: int) -> None:
    logger.warning(
        f"{name} does not run with its first {num_layers} layers alone: all of its layers are kept "
        "in memory"
    )


def cut_if_it_runs(decoder: Decoder, num_layers: int) -> Decoder:
    """Return `oprd.models.decoder.cut`, or the whole decoder if the model needs all its blocks.

    Whether it does is tried without weights, so that all ranks agree before they have any.
    """
    shorter = cut(decoder, num_layers)
    if shorter is decoder:
        return decoder
    depth, blocks = decoder.num_layers, [num_layers - 1]
    try:
        twin = without_weights(decoder.root.config)
        _states(twin, blocks, depth)
    except Exception:  # it does not run without weights, or is not built from its configuration
        return shorter
    if same_states(twin, cut(twin, num_layers), blocks, depth):
        return shorter
    _warn_not_cut(type(decoder.backbone).__name__, num_layers)
    return decoder


@torch.no_grad()
def check_head(model: Any, decoder: Decoder, who: str) -> None:
    """Check that `oprd.models.lm_head.LMHead` computes the model's own logits.

    Raises:
        ConfigError: if it does not: the model does more to them than its head.
    """
    ids = random_ids(decoder)
    with _evaluating(decoder):
        with decoder.running():
            own = model(input_ids=ids, use_cache=False).logits.float()
        last = decoder.forward(ids)
    rows = HeadRows(LMHead.of(model), last.flatten(0, 1))
    ours = rows.logits(slice(None)).float().view_as(own)
    reshard(decoder.root)
    if not _close(ours, own, 0.05):
        raise ConfigError(
            f"the {who} ({type(model).__name__}) does more to its logits than its LM head: they "
            f"differ from the head's products by {_difference(ours, own)}, largest "
            f"{own.abs().max().item():.3g}. Use opd.implementation=materialised"
        )


def _states(
    decoder: Decoder, blocks: Sequence[int], depth: int, with_hidden_states: bool = False
) -> tuple[dict[int, list[Tensor]], Sequence[Tensor] | None]:
    """Run a decoder; return what hooks see, by block, and its own hidden states if it has them."""
    seen: dict[int, list[Tensor]] = {block: [] for block in blocks}
    ids = random_ids(decoder)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if ids.is_meta:  # without a mask, transformers looks at values
        inputs["attention_mask"] = torch.ones_like(ids)
    if with_hidden_states:
        inputs["output_hidden_states"] = True
    watching = watch(decoder, blocks, depth, lambda block, h: seen[block].append(h))
    with watching, _evaluating(decoder), decoder.running():
        output = decoder.run(**inputs)
    reshard(decoder.root)
    own = getattr(output, "hidden_states", None) if with_hidden_states else None
    return seen, own if own is not None and len(own) == depth + 1 else None


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a and b are equal up to a share of b's norm. Without values only shapes count."""
    if a is b or a.shape != b.shape or a.is_meta:
        return a.shape == b.shape
    a, b = a.float(), b.float()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
    return bool((a - b).norm() <= tolerance * b.norm())


def _difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"shape, {tuple(a.shape)} and {tuple(b.shape)}"
    return f"up to {(a.float() - b.float()).abs().max().item():.3g}"
