"""Paired tokens cover the same bytes."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from oprd.alignment import Aligner, align_text
from oprd.demo.task import make_pair_tokenizer, make_tokenizer
from oprd.token_bytes import token_byte_spans, token_bytes


def byte_level(size, normalizer=None):
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizer
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(["the answer is 42, é 你好 한국"] * 20, trainer)
    return token_bytes(PreTrainedTokenizerFast(tokenizer_object=tok))


SMALL, LARGE, NFC = byte_level(256), byte_level(300), byte_level(290, normalizers.NFC())


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 3))
def test_paired_positions_cover_the_same_bytes(text, cut):
    ids = LARGE.encoder.encode(text).ids
    same = align_text(ids, LARGE, LARGE, True)
    assert same == (ids, [*range(len(ids))], [*range(len(ids))], True)
    ids = SMALL.encoder.encode(text).ids
    ids = ids[: max(0, len(ids) - cut)]
    theirs, a, b, _ = align_text(ids, SMALL, LARGE, False)
    ours, others = token_byte_spans(SMALL, ids), token_byte_spans(LARGE, theirs)
    assert [ours[i][1] for i in a] == [others[j][1] for j in b]
    assert a == sorted(set(a))
    assert b == sorted(set(b))


def test_normalized_text_pairs_around_the_change():
    ids = SMALL.encoder.encode("ae\u0301b").ids
    theirs, a, _, whole = align_text(ids, SMALL, NFC, True)
    assert token_byte_spans(NFC, theirs)[-1][1] == len("aéb".encode())
    assert (a, whole) == ([0, 3, 4], True)


def test_sums_in_digits_and_in_pairs_of_digits():
    aligner = Aligner(make_tokenizer(), make_pair_tokenizer())
    prompt = make_pair_tokenizer()("952+1119=")["input_ids"]
    reading = aligner(make_tokenizer()("2071<eos>")["input_ids"], prompt)
    assert reading.pairs == [(1, 0), (3, 1), (4, 2)]
    assert reading.prompt_ids == prompt
