"""``oprd-eval`` reads and grades prompts as the runs among its models do, unless told otherwise."""

import json

import pytest
import yaml

from oprd.config import TrainConfig
from oprd.config.io import to_yaml
from oprd.data.prompts import load_prompts
from oprd.errors import ConfigError
from oprd.evaluation.config import EvalRunConfig
from oprd.evaluation.sets import BOXED, find_sets, read_set
from oprd.evaluation.subjects import find_subjects
from oprd.evaluation.trained import follow, trained
from tests.support.bytes_model import bytes_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "1+1", "question": "1+2", "key": "2", "answer": "3"}))
    return file


@pytest.fixture
def make_run(tmp_path, rows):
    """Writes what tells a run's settings; changes are of sections of its config.yaml."""

    def make(name, **changes):
        values = yaml.safe_load(to_yaml(TrainConfig()))
        source = {"path": str(rows), "prompt_field": "question", "answer_field": "key", "limit": 1}
        values["eval"] |= {"sets": {"val": source}}
        for section, options in changes.items():
            values[section] |= options
        directory = tmp_path / name
        (directory / "student").mkdir(parents=True)
        (directory / "student" / "config.json").write_text("{}")
        (directory / "metrics.jsonl").write_text("")
        (directory / "config.yaml").write_text(yaml.safe_dump(values))
        return directory / "student"

    return make


def asked(sets, *models, **options):
    """The sets and the configuration with which ``oprd-eval`` asks these models."""
    cfg = EvalRunConfig(models=[*map(str, models)], sets=[*map(str, sets)], **options)
    runs = trained(find_subjects(cfg.models, best=False))
    cfg = follow(cfg, runs)
    return find_sets(cfg, runs), cfg


def prompt(found, cfg):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer.decode(read_set(found, cfg, tokenizer).prompts[0].token_ids)


def test_without_a_run_a_set_asks_a_user_for_a_box(rows):
    (found,), cfg = asked([rows])
    assert (found.grader, found.suffix) == ("math", BOXED)
    assert prompt(found, cfg) == f"<user>1+1 {BOXED}"
    assert prompt(*[asked([rows], chat_template="auto")[0][0], EvalRunConfig(chat_template="auto")]
                  ) == f"1+1 {BOXED}"  # fmt: skip


@pytest.mark.parametrize("name", ["val", "rows.jsonl"])
def test_a_set_of_a_run_is_what_it_is_in_training(name, rows, make_run):
    student = make_run("run", data={"chat_template": "auto", "prompt_suffix": "So?"})
    (found,), cfg = asked([name if name == "val" else rows], "demo:teacher", student)
    assert (found.name, found.grader, found.suffix) == ("val", "exact", "So?")
    assert prompt(found, cfg) == "1+2 So?"
    run = TrainConfig()
    run.data.prompt_suffix = "So?"
    there = load_prompts(found.source, run.data, bytes_tokenizer(), for_evaluation=True).prompts
    assert bytes_tokenizer().decode(there[0].token_ids) == "1+2 So?"
    assert there[0].answer == "2"
    assert found.source.limit is None  # all rows


def test_another_set_is_asked_as_the_run_asks(rows, make_run, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text())
    boxes = make_run("a", data={"chat_template": "always", "prompt_suffix": "Box it."})
    (found,), cfg = asked([other], boxes)
    assert (found.grader, prompt(found, cfg)) == ("math", "<user>1+1 Box it.")
    plain = make_run("b")
    (found,), cfg = asked([other], plain)
    assert (found.grader, prompt(found, cfg)) == ("math", f"1+1 {BOXED}")
    (demo,), _ = asked(["demo"], boxes)
    assert (demo.grader, demo.suffix) == ("exact", "")


def test_what_is_given_holds(rows, make_run):
    student = make_run("run", data={"prompt_suffix": "So?"})
    given = {"grader": "math", "prompt_suffix": "!", "chat_template": "always"}
    (found,), cfg = asked(["val"], student, **given)
    assert (found.grader, prompt(found, cfg)) == ("math", "<user>1+2 !")


def test_runs_that_differ_need_a_choice(rows, make_run):
    a, b = make_run("a"), make_run("b", data={"chat_template": "always"}, eval={"grader": "math"})
    a, b = f"a={a}", f"b={b}"
    with pytest.raises(ConfigError, match=r"chat_template is 'auto' and 'always'.*--chat_template"):
        asked([rows], a, b)
    with pytest.raises(ConfigError, match=r"grader is 'exact' and 'math'.*--grader"):
        asked([rows], a, b, chat_template="auto")
    (found,), _ = asked([rows], a, b, chat_template="auto", grader="math")
    assert found.grader == "math"


@pytest.mark.parametrize("text", ["a: [", "3", "data: {}\neval: {}\n", "", "data: 1\neval: [x]\n"])
def test_settings_that_can_not_be_read_are_said(text, rows, make_run, caplog):
    student = make_run("run")
    (student.parent / "config.yaml").write_text(text)
    with caplog.at_level("WARNING", logger="oprd"):
        (found,), _ = asked([rows], student)
    assert "config.yaml can't be read" in caplog.text
    assert found.grader == "math"
