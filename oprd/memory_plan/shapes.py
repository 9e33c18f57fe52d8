"""The shapes of a model and of an update, from which memory is predicted.

Sizes are in bytes. B sequences of T tokens, N = B * T, M supervised rows, e bytes per number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oprd.config import LoraConfig

FLOAT32 = 4
DTYPE_BYTES = {"float32": FLOAT32, "bfloat16": 2, "float16": 2, "float8": 1}
"""Bytes per number."""


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder like Qwen2.

    Attributes:
        d: hidden width.
        layers, heads, kv_heads, head_dim, intermediate, vocab: as in Hugging Face configurations.
        tied: the LM head is the embedding table.
    """

    d: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the shape from a Hugging Face configuration.

        Raises:
            ValueError: if entries are missing; the message names them.
        """
        text = config.get_text_config()
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        missing = [n for n in (*names, "intermediate_size") if not getattr(text, n, None)]
        if missing:
            raise ValueError(
                f"a {type(config).__name__} has no {', '.join(missing)}: the planner knows only "
                "decoders with a gated MLP (Qwen, Llama and similar)"
            )
        d, layers, heads, vocab = (getattr(text, name) for name in names)
        return cls(
            d=d,
            layers=layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or d // heads,
            intermediate=text.intermediate_size,
            vocab=vocab,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    @property
    def block_parameters(self) -> int:
        """Parameters of one block without biases and norms, which are about a thousandth of it."""
        attention = 2 * self.d * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.d * self.intermediate

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        tables = 1 if self.tied else 2
        return self.layers * self.block_parameters + tables * self.vocab * self.d

    def block_activations(self, update: Update) -> int:
        """Return the bytes per token that a block keeps for its backward.

        These are two norms (input in float32, normalised, scaled, 1/rms), attention (q, k, v,
        output, log-sum-exp) and the MLP (gate, its SiLU, up, their product). Autocast makes a
        narrow copy of a norm's output for each of the five projections that read it. If there is a
        mask, `scaled_dot_product_attention` keeps it as numbers, and `transformers` repeats keys
        and values for every head.
        """
        e, stream = update.dtype_bytes, update.stream
        scaled = (2 if stream == e else 5) * e * self.d
        norms = 2 * (FLOAT32 * self.d + stream * self.d + FLOAT32) + scaled
        attention = 2 * e * (self.heads + self.kv_heads) * self.head_dim
        if update.eager:
            narrow = e if e < FLOAT32 else 0
            attention += self.heads * update.span * (FLOAT32 + narrow) + self.repeated(e)
        else:
            attention += FLOAT32 * self.heads
            if update.span:
                attention += update.span * e + self.repeated(e)
        return norms + attention + 4 * e * self.intermediate

    def repeated(self, e: int) -> int:
        """Return the extra bytes per token of keys and values that are repeated for every head."""
        return 2 * e * (self.heads - self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class Update:
    """The shape of one actor update (one micro-batch).

    Attributes:
        batch: B.
        tokens: T.
        rows: M, the supervised rows.
        dtype_bytes: e.
        checkpointing: activations of each block are recomputed in its backward; a number: those of
            the first so many blocks.
        chunk: number of rows per chunk in the chunked losses.
        k: number of tokens in the top-k losses.
        widen_head: the chunked losses make float32 copies of narrower heads' weights (on a CPU).
        shards: data-parallel ranks that weights and gradients are split over (FSDP); 1: not split.
        gathered_bytes: bytes per weight that FSDP has gathered; None: ``dtype_bytes``.
        reduced_bytes: bytes per gradient while it is summed over ranks.
        stream_bytes: bytes per number of the residual stream; None: ``dtype_bytes``. They differ
            under autocast, which narrows products only.
        span: row length of the attention mask: T if sequences are padded, N if they are packed;
            0: there is no mask.
        eager: attention keeps every head's weights.
    """

    batch: int
    tokens: int
    rows: int
    dtype_bytes: int = FLOAT32
    checkpointing: bool | int = True
    chunk: int = 256
    k: int = 16
    widen_head: bool = True
    shards: int = 1
    gathered_bytes: int | None = None
    reduced_bytes: int = FLOAT32
    stream_bytes: int | None = None
    span: int = 0
    eager: bool = False

    def recomputed(self, layers: int) -> int:
        """The number of blocks, of ``layers``, whose activations are recomputed."""
        return layers if self.checkpointing is True else min(self.checkpointing, layers)

    @property
    def gathered(self) -> int:
        """Bytes per gathered weight."""
        return self.gathered_bytes or self.dtype_bytes

    @property
    def stream(self) -> int:
        """Bytes per number in the residual stream."""
        return self.stream_bytes or self.dtype_bytes

    @property
    def all_tokens(self) -> int:
        """N, the tokens of all sequences."""
        return self.batch * self.tokens


def adapter_parameters(shape: Shape, lora: LoraConfig) -> int:
    """Count the parameters of a LoRA adapter on a decoder like Qwen2.

    Each adapted layer has rank * (inputs + outputs) of them.
    """
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    d, wide = shape.d, shape.intermediate
    sizes = {
        "q_proj": d + q,
        "k_proj": d + kv,
        "v_proj": d + kv,
        "o_proj": q + d,
        "gate_proj": d + wide,
        "up_proj": d + wide,
        "down_proj": wide + d,
    }
    names = list(sizes) if lora.target_modules == "all-linear" else lora.target_modules
    return shape.layers * (lora.rank or 0) * sum(sizes.get(name, 0) for name in names)
