"""The forms in which people store prompts, and those that no run can use."""

import gzip
import json

import pytest
from tokenizers.processors import TemplateProcessing

from oprd.config import DataConfig, PromptsConfig
from oprd.data.chat import as_question, plain_ids
from oprd.data.prompts import final_answer, load_prompts, privileged
from oprd.demo.task import make_tokenizer
from oprd.errors import ConfigError
from tests.oprd.data.test_prompts import load, offline, texts, tokenizer, write  # noqa: F401

USER, ASSISTANT = {"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}


def with_special_tokens(template):
    """The demo's tokenizer with a post-processor that adds BOS or EOS."""
    made = make_tokenizer()
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    special = [(t, made.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=special
    )
    return made


@pytest.mark.parametrize(
    ("template", "text", "wanted"),
    [
        ("$A </s>", "1+2", "1+2"),
        ("<s> $A </s>", "1+2", "<s>1+2"),
        ("<s> $A", "<s>1+2", "<s>1+2"),
        ("<s> $A", "1<s>2", "<s>1<s>2"),
        ("$A", "1+2</s>", "1+2</s>"),
    ],
)
def test_special_tokens_of_plain_text(template, text, wanted):
    made = with_special_tokens(template)
    assert made.decode(plain_ids(text, made)).replace(" ", "") == wanted


def test_the_answer_of_fine_tuning_data_is_no_part_of_the_prompt(tmp_path, tokenizer):  # noqa: F811
    rows = [{"prompt": [USER, ASSISTANT]}, {"prompt": [USER, ASSISTANT, USER, ASSISTANT]}]
    found = load(write(tmp_path / "a.jsonl", *rows), tokenizer)
    assert texts(found, tokenizer) == ["1+2=", "1+231+2="]


def test_parts_of_text_and_chats_stored_as_json(tmp_path, tokenizer):  # noqa: F811
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]
    rows = [{"prompt": json.dumps([{"role": "user", "content": parts}])}, {"prompt": "[1+2]"}]
    found = load(write(tmp_path / "a.jsonl", rows[0]), tokenizer)
    assert texts(found, tokenizer) == ["1+2="]
    assert as_question([{"role": "user", "content": parts}], "a") == [USER]
    with pytest.raises(ConfigError, match=r"a: message 0 .* text, got a part of type 'image'"):
        as_question([{"role": "user", "content": [{"type": "image"}]}], "a")


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([ASSISTANT], "no message to answer"),
        ([], "no message to answer"),
        ([{"role": "user", "content": None}], "message 0 of the chat must be text, got None"),
        ([{"role": "user"}], "as message 0"),
        (["1+2"], "as message 0"),
    ],
)
def test_chats_that_ask_nothing(tmp_path, chat, message, tokenizer):  # noqa: F811
    path = tmp_path / "a.jsonl"
    with pytest.raises(ConfigError, match=message):
        load(write(path, {"prompt": [USER]}, {"prompt": chat}), tokenizer)


def test_a_template_that_refuses_a_chat(tmp_path, tokenizer):  # noqa: F811
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    source = write(tmp_path / "a.jsonl", {"prompt": [{"role": "system", "content": "1"}, USER]})
    with pytest.raises(
        ConfigError, match=r"a\.jsonl:1: .* refuses this chat of system, user: no system role"
    ):
        load(source, tokenizer)


def test_byte_order_marks_and_other_encodings(tmp_path, tokenizer):  # noqa: F811
    path = tmp_path / "a.jsonl"
    source = write(path, "")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "1+2="}).encode())
    assert texts(load(source, tokenizer), tokenizer) == ["1+2="]
    path.write_bytes(b'{"prompt": "1"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: not UTF-8"):
        load(source, tokenizer)


def test_compressed_files_directories_and_patterns(tmp_path, tokenizer):  # noqa: F811
    source = write(tmp_path / "b.jsonl", {"prompt": "2+2="}, "\n", {"prompt": "3+3="})
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"prompt": "1+1="}\n'))
    (tmp_path / "notes.txt").write_text("no prompts")
    source.path = str(packed)
    assert texts(load(source, tokenizer), tokenizer) == ["1+1="]
    for path in (tmp_path, tmp_path / "*.jsonl*"):
        source.path = str(path)
        assert texts(load(source, tokenizer), tokenizer) == ["1+1=", "2+2=", "3+3="]
    write(tmp_path / "c.jsonl", {"prompt": "4+4="}, "\n", {"prompt": None})
    with pytest.raises(ConfigError, match=r"c\.jsonl:3: no field 'prompt'"):
        load(source, tokenizer)
    source.path = str(tmp_path / "*.parquet")
    with pytest.raises(ConfigError, match=r"\*\.parquet matches no file"):
        load(source, tokenizer)


@pytest.mark.parametrize(
    ("answer", "final"),
    [("48/2 = 24 clips.\n#### 72", "72"), ("#### 1,000", "1,000"), ("7", "7"), ("a # b", "a # b")],
)
def test_the_answer_of_a_worked_solution(answer, final):
    assert final_answer(answer) == final


def test_braces_in_a_teachers_prompt():
    template = r"{prompt} The answer is \boxed{{{answer}}}, not \frac{{1}}{{2}} or {}."
    found = privileged("1+2", template, {"answer": 3}, "a")
    assert found == r"1+2 The answer is \boxed{3}, not \frac{1}{2} or {}."


def test_brackets_in_a_name_that_exists(tmp_path):
    directory = tmp_path / "dir [old]"
    directory.mkdir()
    (directory / "p.jsonl").write_text('{"prompt": "1+1="}')
    for path in (directory / "p.jsonl", directory, f"{tmp_path}/dir */p.jsonl"):
        assert len(load_prompts(PromptsConfig(str(path)), DataConfig(), make_tokenizer())) == 1


def test_half_a_character_is_an_error_with_its_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "1+1="}\n{"prompt": "1+\\ud800="}')
    with pytest.raises(ConfigError, match=r"p\.jsonl:2: the prompt holds half of a surrogate"):
        load_prompts(PromptsConfig(str(file)), DataConfig(), make_tokenizer())
