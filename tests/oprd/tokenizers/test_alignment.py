"""Paired tokens cover the same bytes, for each family of tokenizers, trained on a few lines."""

import json
from itertools import accumulate

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from oprd.demo.task import make_tokenizer
from oprd.errors import ConfigError
from oprd.tokenizers.alignment import Aligner, align_text
from oprd.tokenizers.token_bytes import token_bytes
from tests.support.tiny import make_pair_tokenizer

CORPUS = ["the answer is 42, and e\u0301 \u4f60\u597d \ud55c\uad6d  why\n\tnot"] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<think>"]


def trained(model, trainer, decoder, pre_tokenizer=None, normalizer=None):
    tok = Tokenizer(model)
    tok.normalizer, tok.pre_tokenizer, tok.decoder = normalizer, pre_tokenizer, decoder
    tok.train_from_iterator(CORPUS, trainer)
    bos = ("<s>", tok.token_to_id("<s>"))  # asymmetric: not every family has one
    if bos[1] is not None:
        tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<think>"],
    )  # fmt: skip


def byte_level(size, normalizer=None):
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL, show_progress=False,
    )  # fmt: skip
    pre = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return trained(models.BPE(), trainer, decoders.ByteLevel(), pre, normalizer)


def byte_fallback(scheme):
    """As Llama-2's: ``▁`` for spaces, bytes where a character is missing, a dummy prefix."""
    pieces = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[*SPECIAL, *pieces], show_progress=False
    )
    steps = [normalizers.Replace(" ", "\u2581")]
    if scheme == "prepend":
        steps.insert(0, normalizers.Prepend("\u2581"))
    decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    pre = None
    if scheme != "prepend":
        pre = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme)
    made = trained(
        models.BPE(byte_fallback=True, unk_token="<unk>"), trainer, decoder, pre,
        normalizers.Sequence(steps),
    )  # fmt: skip
    # Trained as special so that they exist; a byte is an ordinary token of the vocabulary.
    state = json.loads(made.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in pieces]
    tok = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", eos_token="</s>")


def unigram(normalizer=None):
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    pre, decoder = pre_tokenizers.Metaspace("\u2581"), decoders.Metaspace("\u2581")
    return trained(models.Unigram(), trainer, decoder, pre, normalizer)


TOKENIZERS = {
    "bytes": byte_level(260),
    "byte-level": byte_level(300),
    "byte-level NFC": byte_level(290, normalizers.NFC()),
    "byte-level NFKC": byte_level(290, normalizers.NFKC()),
    "byte-fallback": byte_fallback("prepend"),
    "byte-fallback, Metaspace always": byte_fallback("always"),
    "byte-fallback, Metaspace first": byte_fallback("first"),
    "byte-fallback, Metaspace never": byte_fallback("never"),
    "unigram": unigram(),
    "unigram NFKC": unigram(normalizers.NFKC()),
}
KNOWN = {name: token_bytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([" ", "  ", "\n", "the", " answer", "4", "e\u0301", "\u00e9", "\u4f60",
                     "\ufb01", "\U0001f468\u200d\U0001f469", "\u2581", "<s>", "\uac00",
                     "\u1100\u1161"])
).map("".join)  # fmt: skip


@pytest.mark.parametrize("teacher", list(KNOWN))
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, cut=st.integers(0, 3))
@example(text="", cut=0)
@example(text=" e\u0301 \u4f60\u597d", cut=2)
def test_paired_tokens_end_at_the_same_byte(teacher, text, cut):
    """From any bytes: the student spells them one at a time, and may stop inside a character."""
    ours, theirs = KNOWN["bytes"], KNOWN[teacher]
    ids = ours.encoder.encode(text).ids
    ids = ids[: max(0, len(ids) - cut)]
    tokens, a, b, whole = align_text(ids, ours, theirs, complete=False)
    assert a == sorted(set(a))
    assert b == sorted(set(b))
    data = b"".join(ours.spell(i) for i in ids)
    spelled = [theirs.spell(t) for t in tokens]
    if theirs.as_decoded(data.decode(errors="ignore")).encode() == data and None not in spelled:
        ends = list(accumulate(len(ours.spell(i) or b"") for i in ids))
        their_ends = list(accumulate(map(len, spelled)))
        assert [ends[i] for i in a] == [their_ends[j] for j in b]
        assert data[: ends[a[-1]]].startswith(b"".join(spelled[: b[-1] + 1])) if a else True
        assert whole or not tokens or data.decode(errors="ignore").encode() != data


@pytest.mark.parametrize("name", list(KNOWN))
@pytest.mark.parametrize("text", ["the answer is 42", " leading", "why\n\tnot", "\u4f60\u597d"])
def test_the_same_tokenizer_pairs_every_token(name, text):
    known = KNOWN[name]
    ids = known.encoder.encode(text).ids
    if any(known.spell(i) is None for i in ids):
        assert name.startswith("unigram")  # without byte fallback some characters are unknown
        return
    assert align_text(ids, known, known, True) == (
        ids,
        [*range(len(ids))],
        [*range(len(ids))],
        True,
    )


@pytest.mark.parametrize("name", [n for n in KNOWN if n.startswith("byte")])
def test_real_words_pair_often_and_cover_everything(name):
    ids = KNOWN["byte-level"].encoder.encode("the answer is 42, and why not").ids
    tokens, a, _, whole = align_text(ids, KNOWN["byte-level"], KNOWN[name], True)
    assert whole
    assert len(a) / len(ids) > 0.3
    assert b"".join(KNOWN[name].spell(t) for t in tokens) == b"the answer is 42, and why not"


def test_normalized_text_pairs_around_the_change():
    known, other = KNOWN["bytes"], KNOWN["byte-level NFC"]
    ids = known.encoder.encode("ae\u0301b").ids
    tokens, a, _, whole = align_text(ids, known, other, True)
    assert b"".join(other.spell(t) for t in tokens) == "a\u00e9b".encode()
    assert (a, whole) == ([0, 3, 4], True)


def test_a_response_cut_inside_a_character():
    known, other = KNOWN["bytes"], KNOWN["byte-level"]
    ids = known.encoder.encode("a\u4f60").ids
    tokens, a, b, whole = align_text(ids[:-1], known, other, complete=False)
    assert (a, b, whole) == ([0], [0], False)  # the beginning of a character is left out
    assert b"".join(other.spell(t) for t in tokens) == b"a"


def test_bytes_that_are_no_text_in_the_middle():
    known = KNOWN["bytes"]
    stray = known.single[0xE4]
    ids = [*known.encoder.encode("a").ids, stray, *known.encoder.encode("b").ids]
    tokens, a, _, whole = align_text(ids, known, KNOWN["byte-fallback"], True)
    assert b"".join(KNOWN["byte-fallback"].spell(t) for t in tokens) == b"a\xe4b"
    assert (a, whole) == ([0, 1, 2], True)
    _, a, _, whole = align_text(ids, known, KNOWN["unigram"], True)  # has no tokens for bytes
    assert (a, whole) == ([0], False)


def test_special_tokens_inside_pair_by_what_is_written_for_them():
    ours, theirs = TOKENIZERS["bytes"], TOKENIZERS["byte-level"]
    think = ours.convert_tokens_to_ids("<think>")
    a, b = (ours(text, add_special_tokens=False)["input_ids"][-1] for text in ("a", "b"))
    reading = Aligner(ours, theirs)([a, think, b, ours.eos_token_id], [7, 8])
    assert reading.prompt_ids == [7, 8]
    assert reading.response_ids[1] == theirs.convert_tokens_to_ids("<think>")
    assert reading.response_ids[-1] == theirs.eos_token_id
    assert reading.pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_a_special_token_that_the_teacher_lacks_is_unpaired():
    known = KNOWN["bytes"]
    ids = [*known.encoder.encode("a").ids, known.special["<think>"], *known.encoder.encode("b").ids]
    other = token_bytes(make_pair_tokenizer())  # knows neither
    assert "<think>" not in other.added
    _, a, b, _ = align_text(ids, known, KNOWN["unigram"], True)
    assert (a[1], b[1]) == (1, 1)  # trained with it
    _, a, _, _ = align_text(ids, known, other, True)
    assert 1 not in a


def test_text_that_spells_a_special_token_stays_text():
    known, other = KNOWN["bytes"], KNOWN["byte-level"]
    tokens, _, _, whole = align_text(known.encoder.encode("<s>").ids, known, other, True)
    assert whole
    assert other.special["<s>"] not in tokens
    assert b"".join(other.spell(t) for t in tokens) == b"<s>"


def test_empty_responses():
    aligner = Aligner(make_tokenizer(), make_pair_tokenizer())
    assert aligner([], [5]).pairs == []
    assert aligner([1], [5]).pairs == [(0, 0)]


def test_sums_in_digits_and_in_pairs_of_digits():
    aligner = Aligner(make_tokenizer(), make_pair_tokenizer(), pairs="all")
    prompt = make_pair_tokenizer()("952+1119=")["input_ids"]
    reading = aligner(make_tokenizer()("2071<eos>")["input_ids"], prompt)
    assert reading.pairs == [(0, 0), (1, 1), (3, 2), (4, 3)]
    assert reading.prompt_ids == prompt


def word_piece():
    vocab = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    tok = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    return BertTokenizerFast(tokenizer_object=tok)


def suffixed():
    tok = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tok.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tok)


def undecoded():
    tok = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tok.add_tokens([AddedToken("b")])
    return PreTrainedTokenizerFast(tokenizer_object=tok)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (word_piece, "is WordPiece"),
        (suffixed, "end_of_word_suffix='</w>'"),
        (undecoded, "has no decoder"),
        (lambda: object(), r"\(object\) has no backend"),
    ],
)
def test_other_families_are_refused_by_name(make, message):
    with pytest.raises(ConfigError, match=f"the teacher's tokenizer.*{message}"):
        token_bytes(make(), "teacher's")
