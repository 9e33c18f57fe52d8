"""Rows of a key-value cache: some kept, others joined to them.

All rows of a cache are as long as its longest, and shorter ones are padded on the left, as in
`generate`. An attention mask hides the padding, so it can grow and shrink.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PretrainedConfig
from transformers import cache_utils as kinds
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from oprd.errors import ConfigError

KNOWN = {
    getattr(kinds, name, None)  # transformers 5.16 lacks the last
    for name in (
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    )
}
"""The layers of a cache whose rows can be told apart: keys and values by token, or states by row.
Others, for example those with an index of tokens, keep more."""


def why_not(config: PretrainedConfig, model: type | None = None) -> str | None:
    """Return why rows of a model's cache can't be kept and joined, or None if they can.

    Args:
        config: the model's configuration.
        model: its class; None: the one that transformers builds as a causal LM.
    """
    if model is None and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model is not None and not model._supports_default_dynamic_cache():  # type: ignore[attr-defined]
        return f"{model.__name__} has a cache of its own"
    if model is not None and cache_name(model) is None:
        return f"{model.__name__} has no cache"
    for layer in make_cache(config).layers:
        if type(layer) not in KNOWN:
            return f"its cache has layers of the kind {type(layer).__name__}"
    return None


def check_continuous(
    config: PretrainedConfig, who: str, option: str, model: type | None = None
) -> None:
    """Check that continuous batching works for a model.

    Args:
        config, model: as for `why_not`.
        who: what messages call it.
        option: the option that asks for it, for messages.

    Raises:
        ConfigError: if it does not.
    """
    if why := why_not(config, model):
        raise ConfigError(
            f"{option}=continuous can't sample from {who}: {why}, so sequences can't be taken out "
            f"of a batch. Use {option}=generate"
        )


def cache_name(model: type) -> str | None:
    """Return the name by which a model's forward pass takes its cache: it changed over time."""
    names = inspect.signature(model.forward).parameters  # type: ignore[attr-defined]
    return next((n for n in ("cache", "past_key_values", "cache_params") if n in names), None)


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """Return an empty cache, as `generate` makes it."""
    return DynamicCache(config=config.get_text_config(decoder=True))


def keep(cache: DynamicCache, rows: Tensor, length: int) -> None:
    """Keep some rows of a cache.

    Args:
        rows: indices of the rows to keep, in their new order; int64.
        length: tokens of the longest of them, to which padding is cut. In a layer with a sliding
            window no more than the window is stored.
    """
    for layer in cache.layers:
        if _has_tokens(layer):
            stored = min(layer.keys.shape[2], length)
            layer.keys = layer.keys[:, :, -stored:][rows]
            layer.values = layer.values[:, :, -stored:][rows]
            _set_length(layer, length)
        for states, name in _states(layer):
            states[name] = states[name][rows]


def join(cache: DynamicCache, other: DynamicCache, length: int) -> DynamicCache:
    """Append the rows of another cache to those of a cache, and return it.

    Args:
        other: of as many layers. It loses its tensors.
        length: tokens of the longest row of both.
    """
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if _has_tokens(layer):
            layer.keys = _joined(layer.keys, more.keys)
            layer.values = _joined(layer.values, more.values)
            more.keys = more.values = None
            _set_length(layer, length)
        for (states, name), (others, _) in zip(_states(layer), _states(more), strict=True):
            states[name] = torch.cat([states[name], others[name]])
    return cache


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Join keys or values, (rows, heads, tokens, width), of different numbers of tokens."""
    tokens = max(a.shape[2], b.shape[2])
    return torch.cat([pad(x, (0, 0, tokens - x.shape[2], 0)) for x in (a, b)])


def _has_tokens(layer: object) -> bool:
    return isinstance(layer, DynamicLayer) and layer.get_seq_length() > 0


def _set_length(layer: DynamicLayer, length: int) -> None:
    if hasattr(layer, "cumulative_length"):  # beyond the window, it isn't that of the keys
        layer.cumulative_length = length


def _states(layer: object) -> Iterator[tuple[dict[int, Tensor], int]]:
    """Yield where the layer has states with one entry a row: a convolution's and a recurrence's."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for states in (layer.conv_states, layer.recurrent_states):
            yield from ((states, name) for name, state in states.items() if state is not None)
