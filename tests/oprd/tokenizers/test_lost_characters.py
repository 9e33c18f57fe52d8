"""Characters that tokenizers drop without a word, and what is said about them."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.config import DataConfig, EvalConfig, EvalSetConfig, PromptsConfig, TrainConfig
from oprd.data.prompts import load_prompts
from oprd.demo.task import make_tokenizer
from oprd.evaluation import run
from oprd.evaluation.config import EvalRunConfig
from oprd.tokenizers.lost_characters import LostCharacters
from oprd.training.inputs import RunInputs, load_inputs
from tests.support.bytes_model import bytes_tokenizer

LETTERS = {letter: i for i, letter in enumerate("ab c\u00e9")}


def make(model, normalizer=None, pre_tokenizer=None, **special):
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


CASES = {
    "BPE without unk": (
        lambda: make(models.BPE(LETTERS, []), normalizers.NFC()),
        "ae\u0301 \u6f22b\u5b57\u6f22",  # a letter and its accent are one known character
        "\u6f22\u5b57",
    ),
    "BPE with unk": (
        lambda: make(models.BPE(LETTERS | {"<u>": 9}, [], unk_token="<u>"), unk_token="<u>"),
        "a\u6f22b<u>",
        "\u6f22",
    ),
    "byte fallback": (
        lambda: make(models.BPE(
            LETTERS | {f"<0x{b:02X}>": 10 + b for b in range(256)}, [], byte_fallback=True
        )),
        "a\u6f22\n\x00",
        "",
    ),
    "byte level": (bytes_tokenizer, "a\u6f22\n\x00\U0001f600", ""),
    "Unigram": (
        lambda: make(
            models.Unigram([("<u>", 0.0), ("\u2581", -1.0), ("ab", -1.0), ("a", -2.0)], 0, False),
            pre_tokenizer=pre_tokenizers.Metaspace(), unk_token="<u>",
        ),
        "ab a \u6f22",
        "\u6f22",
    ),
    "WordPiece": (
        lambda: make(
            models.WordPiece({"[U]": 0, "ab": 1, "##c": 2, "a": 3, "c": 4}, unk_token="[U]"),
            normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), unk_token="[U]",
        ),
        "abc ABC \u00e1bc\x00 \u6f22",  # case, accents and controls are the normalizer's to remove
        "\u6f22",
    ),
    "whole words": (
        lambda: make(models.WordLevel({"[U]": 0, "hello": 1}, unk_token="[U]"),
                     pre_tokenizer=pre_tokenizers.Whitespace(), unk_token="[U]"),
        "hello hello you",
        "you",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_each_kind_of_tokenizer_loses(case):
    build, text, lost = CASES[case]
    find = LostCharacters(build())
    assert find(text) == lost
    assert find(text) == lost  # from what is remembered
    assert find("a" if case != "whole words" else "hello") == ""


@pytest.fixture
def load(tmp_path):
    """Loads prompts that a tokenizer with some letters reads."""

    def load(rows, **source):
        file = tmp_path / "p.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = make(models.BPE(LETTERS, []), eos_token="<eos>")
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        other = {"": bytes_tokenizer()} if source.pop("other", False) else {}
        prompts = PromptsConfig(str(file), **source)
        return load_prompts(prompts, DataConfig(), tokenizer, teacher_tokenizers=other)

    return load


def test_prompts_that_lose_characters_are_counted_with_an_example(load):
    chat = [{"role": "user", "content": "b \u6f22"}]
    rows = [{"prompt": p} for p in ("a b", "a \u6f22\u5b57 b", chat, "ab", "cab")]
    (message,) = load(rows).lost
    assert message.startswith("2 of 5 prompts have characters")
    assert "and leaves out: '\u6f22', '\u5b57'. The first is" in message
    assert "p.jsonl:2, 'a \u6f22\u5b57 b'" in message
    assert load(rows[:1]).lost == ()


def test_what_the_teacher_is_told_is_looked_at_too(load):
    rows = [{"prompt": "ab", "answer": "\u6f22"}, {"prompt": "abc", "answer": "a"}]
    (message,) = load(rows, teacher_prompt="{prompt} {answer}").lost
    assert message.startswith("1 of 2 teacher's prompts have characters")
    assert load(rows, teacher_prompt="{prompt} {answer}", other=True).lost == ()


@pytest.fixture
def sums(tmp_path):
    """Sums that the demo's tokenizer knows, but for one."""
    file = tmp_path / "sums.jsonl"
    rows = [{"prompt": p, "answer": "3"} for p in ("100+200=", "100 plus 200=", "300+200=")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


SAID = "1 of 3 prompts have characters that the tokenizer does not know and reads as its unknown"


def test_training_says_so_before_it_begins(sums):
    source = EvalSetConfig(sums)
    cfg = TrainConfig(data=DataConfig(train=PromptsConfig(sums)), eval=EvalConfig({"val": source}))
    inputs = RunInputs(tokenizer=make_tokenizer())
    load_inputs(cfg, inputs, lambda load: load())
    said = [note for note in inputs.notes if SAID in note]
    assert [note.partition(":")[0] for note in said] == ["data.train", "val"]


def test_an_evaluation_says_so_too(sums, tmp_path, caplog):
    options = {"models": ["demo:student"], "sets": [sums], "prompt_suffix": ""}
    with caplog.at_level("WARNING", logger="oprd"):
        run._Run(EvalRunConfig(**options, output_dir=str(tmp_path / "out")))
    assert f"demo:student, sums: {SAID}" in caplog.text
    assert "sums.jsonl:2, '100 plus 200='" in caplog.text
