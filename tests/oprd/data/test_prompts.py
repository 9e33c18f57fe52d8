"""Prompts from files: formats, chat templates, and errors that say where."""

import json
from itertools import islice
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from oprd.config import DataConfig, PromptsConfig, check_values
from oprd.config.demo import demo_config
from oprd.data.chat import encode_prompt, with_suffix
from oprd.data.prompts import load_prompts
from oprd.data.rows import load_rows
from oprd.data.sampler import PromptSampler
from oprd.demo.task import make_tokenizer
from oprd.errors import ConfigError, Unreachable

SHARED = Path(__file__).parents[4] / "shared" / "data"
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}{% if enable_thinking is false %}+{% endif %}"
)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No waiting for a hub, no cache shared between tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return PromptsConfig(str(path))


def load(source, tokenizer, for_evaluation=False, **options):
    options = {"max_prompt_tokens": 100} | options
    return load_prompts(source, DataConfig(**options), tokenizer, for_evaluation)


def texts(found, tokenizer):
    return [tokenizer.decode(p.token_ids) for p in found.prompts]


def test_plain_text_and_chat_messages(tmp_path, tokenizer):
    plain = write(tmp_path / "a.jsonl", {"prompt": "1+2=", "answer": "3"})
    chat = write(tmp_path / "b.jsonl", {"prompt": [{"role": "user", "content": "1+2"}]})
    assert texts(load(plain, tokenizer), tokenizer) == ["1+2="]
    assert texts(load(chat, tokenizer), tokenizer) == ["1+2="]
    assert texts(load(plain, tokenizer, chat_template="always"), tokenizer) == ["1+2=="]
    assert texts(load(chat, tokenizer, chat_template="never"), tokenizer) == ["1+2"]
    thinking_off = load(chat, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert texts(thinking_off, tokenizer) == ["1+2=+"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_file_formats_and_nested_fields(tmp_path, tokenizer, suffix):
    file = tmp_path / f"prompts{suffix}"
    rows = [{"question": {"text": f"{i}="}, "gold": i} for i in range(3)]
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    source = PromptsConfig(str(file), prompt_field="question.text", answer_field="gold", limit=2)
    found = load(source, tokenizer, for_evaluation=True)
    assert texts(found, tokenizer) == ["0=", "1="]
    assert [p.answer for p in found.prompts] == ["0", "1"]


def test_long_prompts_are_dropped_and_counted_or_an_error(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", {"prompt": "1"}, {"prompt": "12345"}, {"prompt": "12"})
    found = load(source, tokenizer, max_prompt_tokens=3)
    assert (len(found), found.dropped) == (2, 1)
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: the prompt has 5 tokens, more than .*=3"):
        load(source, tokenizer, max_prompt_tokens=3, overlong="error")
    source = write(tmp_path / "b.jsonl", {"prompt": "12345"})
    with pytest.raises(ConfigError, match="all 1 prompts"):
        load(source, tokenizer, max_prompt_tokens=3)


def test_repeated_prompts_count_once_in_training_only(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", *[{"prompt": "1", "answer": "1"}] * 3, {"prompt": "2"})
    found = load(source, tokenizer)
    assert (len(found), found.repeated) == (2, 2)
    source = write(tmp_path / "b.jsonl", *[{"prompt": "1", "answer": "1"}] * 3)
    assert len(load(source, tokenizer, for_evaluation=True)) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"a\.jsonl is empty"),
        (["\n\n"], r"a\.jsonl is empty"),
        ([{"prompt": "1"}, "\n", "{oops\n"], r"a\.jsonl:3: not JSON"),
        ([{"prompt": "1"}, "[1]\n"], r"a\.jsonl:2: expected a JSON object, got \[1\]"),
        ([{"prompt": "1"}, "\n", {"question": "2"}], r"a\.jsonl:3: no field 'prompt'; .*question"),
        ([{"prompt": 3}], r"a\.jsonl:1: a prompt is text or a list of messages, got 3"),
        ([{"prompt": [{"content": "1"}]}], r"a\.jsonl:1: a chat prompt is a list of"),
        ([{"prompt": ""}], r"a\.jsonl:1: the prompt has no tokens"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, tokenizer, rows, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path / "a.jsonl", *rows), tokenizer)


def test_missing_answers_matter_to_evaluation_only(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", {"prompt": "1"})
    assert len(load(source, tokenizer)) == 1
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: no field 'answer'"):
        load(source, tokenizer, for_evaluation=True)


def test_other_bad_sources(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="does not exist"):
        load(PromptsConfig(str(tmp_path / "none.jsonl")), tokenizer)
    (tmp_path / "a.txt").write_text("1")
    with pytest.raises(ConfigError, match=r"nor a file ending in \.jsonl"):
        load(PromptsConfig(str(tmp_path / "a.txt")), tokenizer)
    (tmp_path / "a.parquet").write_text("1")
    with pytest.raises(ConfigError, match=r"a\.parquet can't be read as parquet"):
        load(PromptsConfig(str(tmp_path / "a.parquet")), tokenizer)
    with pytest.raises(Unreachable, match=r"'some/set'.*can't be loaded"):
        load(PromptsConfig("some/set"), tokenizer)


def test_chat_without_a_template_is_explained():
    chat = [{"role": "user", "content": "1"}]
    with pytest.raises(ConfigError, match=r"x:1: .*no chat template"):
        encode_prompt(chat, make_tokenizer(), DataConfig(), "x:1")


def test_suffix_is_added_once_to_the_last_user_message():
    assert with_suffix("1+2", "Box it.") == "1+2 Box it."
    assert with_suffix("1+2 Box it.", "Box it.") == "1+2 Box it."
    assert with_suffix("x \\boxed{{}}.", "\\boxed{}.") == "x \\boxed{{}}."
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert with_suffix(chat, "c") == [{"role": "user", "content": "a c"}, chat[1]]


def test_the_sampler_covers_every_prompt_each_epoch_and_repeats_by_seed():
    batches = list(islice(PromptSampler(5, 3, seed=1), 10))
    assert all(len(b) == 3 for b in batches)
    flat = [i for b in batches for i in b]
    for epoch in range(6):
        assert sorted(flat[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert batches == list(islice(PromptSampler(5, 3, seed=1), 10))
    assert batches != list(islice(PromptSampler(5, 3, seed=2), 10))


@pytest.mark.parametrize("drawn", [0, 1, 2, 5, 7])
def test_the_sampler_goes_on_from_any_position(drawn):
    first = PromptSampler(5, 3, seed=1)
    batches = list(islice(first, drawn + 4))
    position = PromptSampler(5, 3, seed=1)
    list(islice(position, drawn))
    second = PromptSampler(5, 3, seed=1)
    next(second)
    second.load_state_dict(json.loads(json.dumps(position.state_dict())))
    assert list(islice(second, 4)) == batches[drawn:]


def test_the_sampler_knows_its_prompts():
    with pytest.raises(ConfigError, match="another sequence of prompts"):
        PromptSampler(6, 3, seed=1).load_state_dict(PromptSampler(5, 3, seed=1).state_dict())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published data are not on this machine")
@pytest.mark.parametrize("name", ["dapo-math-17k-sample", "AIME24", "AIME25", "AIMO"])
def test_the_published_layout(tokenizer, name):
    source = PromptsConfig(
        str(SHARED / f"{name}.parquet"), answer_field="reward_model.ground_truth"
    )
    found = load(source, tokenizer, for_evaluation=True, max_prompt_tokens=10_000)
    rows = {"dapo-math-17k-sample": 256, "AIME24": 30, "AIME25": 30, "AIMO": 83}
    assert len(found) == rows[name]
    assert all(p.answer for p in found.prompts)


class Hub:
    """Stands for `datasets.load_dataset`."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def __call__(self, path, name=None, **options):
        self.calls.append((path, name, options))
        if self.error is not None:
            raise self.error
        rows = Dataset.from_list([{"prompt": f"{i}+1="} for i in range(10)])
        return rows.to_iterable_dataset() if options.get("streaming") else rows


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_set_is_asked_for_by_subset_and_revision(monkeypatch, streaming):
    hub = Hub()
    monkeypatch.setattr("oprd.data.rows.load_dataset", hub)
    cfg = PromptsConfig(
        "some/set", subset="main", split="test", revision="abc", streaming=streaming, limit=3
    )
    rows, place = load_rows(cfg)
    assert [row["prompt"] for row in rows] == ["0+1=", "1+1=", "2+1="]
    assert place(1) == "some/set, row 1"
    options = {"split": "test", "revision": "abc"} | ({"streaming": True} if streaming else {})
    assert hub.calls == [("some/set", "main", options)]


def test_a_subset_is_asked_for(monkeypatch):
    error = ValueError("Config name is missing.\nPlease pick one among ['main', 'socratic']")
    monkeypatch.setattr("oprd.data.rows.load_dataset", Hub(error))
    with pytest.raises(ConfigError, match=r"(?s)split 'train'.*socratic'\]. Set subset to one of"):
        load_rows(PromptsConfig("some/set"))


def test_streaming_needs_a_limit():
    cfg = demo_config()
    cfg.data.train = PromptsConfig("some/set", streaming=True)
    with pytest.raises(ConfigError, match=r"data\.train\.streaming needs a limit"):
        check_values(cfg)
