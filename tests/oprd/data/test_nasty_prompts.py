"""Prompt files made by rule: each gives prompts, or an error that names the file."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oprd.config import DataConfig, PromptsConfig
from oprd.data.prompts import Prompt, load_prompts
from oprd.demo.task import make_tokenizer
from oprd.errors import ConfigError

TEXT = st.one_of(
    st.sampled_from(
        ["1+1=", "", " ", "\ufeff1+1=", "\u2028", "{x}", "[{", "[{}]", "a\x00b", "9" * 200]
    ),
    st.text(max_size=8),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), TEXT)
PARTS = st.one_of(
    TEXT,
    st.none(),
    st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "image_url", "input_text"])},
            optional={"text": SCALARS, "image_url": TEXT},
        ),
        max_size=3,
    ),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "", "USER"])},
    optional={"content": PARTS, "name": TEXT, "tool_calls": st.lists(TEXT, max_size=1)},
)
CHAT = st.lists(MESSAGE, max_size=4)
PROMPT = st.one_of(TEXT, SCALARS, CHAT, CHAT.map(json.dumps), st.lists(SCALARS, max_size=2))
ROW = st.fixed_dictionaries({"prompt": PROMPT}, optional={"answer": SCALARS, "x": SCALARS})
ROWS = st.lists(ROW.map(json.dumps), min_size=1, max_size=3)
LINE = st.one_of(
    st.dictionaries(TEXT, SCALARS, max_size=2).map(json.dumps),
    SCALARS.map(json.dumps),
    TEXT,
    ROW.map(lambda row: json.dumps(row)[:-2]),
    ROW.map(json.dumps),
)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.content }}{% endfor %}="
)


def load(file, data, **options):
    """Load the prompts of a file with these bytes, or return the ConfigError's message."""
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    source = PromptsConfig(str(file), teacher_prompt=options["teacher_prompt"])
    cfg = DataConfig(chat_template=options["chat_template"], max_prompt_tokens=50)
    try:
        prompts = load_prompts(source, cfg, tokenizer, options["for_evaluation"]).prompts
    except ConfigError as error:
        return str(error)
    assert prompts
    assert all(isinstance(p, Prompt) and 0 < len(p.token_ids) <= 50 for p in prompts)
    return prompts


OPTIONS = st.fixed_dictionaries(
    {
        "chat_template": st.sampled_from(["auto", "always", "never"]),
        "for_evaluation": st.booleans(),
        "teacher_prompt": st.sampled_from([None, "{prompt}{answer}", "{x}}", "\\boxed{{{x}}}"]),
    }
)
quick = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@quick
@given(rows=ROWS, options=OPTIONS, is_array=st.booleans())
def test_every_value_gives_a_prompt_or_an_error_with_its_line(tmp_path, rows, options, is_array):
    file = tmp_path / ("p.json" if is_array else "p.jsonl")
    text = f"[{', '.join(rows)}]" if is_array else "\n".join(rows)
    loaded = load(file, text.encode(), **options)
    if isinstance(loaded, str):
        assert str(file) in loaded
        assert f"{file}{', row ' if is_array else ':'}" in loaded or "are longer than" in loaded


@quick
@given(
    lines=st.lists(LINE, max_size=3),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
    newline=st.sampled_from(["\n", "\r\n", "\n\n", "\r"]),
    suffix=st.sampled_from([".jsonl", ".json", ".jsonl.gz"]),
    options=OPTIONS,
)
def test_every_file_loads_or_is_explained(tmp_path, lines, encoding, newline, suffix, options):
    file = tmp_path / f"p{suffix}"
    loaded = load(file, newline.join(lines).encode(encoding, errors="replace"), **options)
    assert not isinstance(loaded, str) or str(file) in loaded


def test_what_is_no_gzip_and_what_no_parquet(tmp_path):
    file = tmp_path / "p.jsonl.gz"
    file.write_text('{"prompt": "1+1="}')
    with pytest.raises(ConfigError, match=r"p\.jsonl\.gz can't be read"):
        load_prompts(PromptsConfig(str(file)), DataConfig(), make_tokenizer())
    file = tmp_path / "p.parquet"
    file.write_text('{"prompt": "1+1="}')
    with pytest.raises(ConfigError, match=r"p\.parquet can't be read"):
        load_prompts(PromptsConfig(str(file)), DataConfig(), make_tokenizer())
