"""reasoning-gym's tasks as prompts, and their scorers."""

import importlib.util
import os
import subprocess
import sys

import pytest

from oprd.config import DataConfig, PromptsConfig
from oprd.data import reasoning_gym
from oprd.data.prompts import load_prompts, load_training_prompts
from oprd.data.rows import load_rows
from oprd.errors import ConfigError
from oprd.evaluation.config import EvalRunConfig
from oprd.evaluation.grader_pool import grade_all
from oprd.evaluation.run import evaluate_models
from tests.support.bytes_model import bytes_tokenizer, save_bytes_model

SUMS = "reasoning_gym:chain_sum?max_terms=3"
needs_it = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="reasoning-gym is not installed: pip install 'oprd[reasoning-gym]'",
)


def solved(question):
    """The value of a chain of sums."""
    return str(eval(question.partition(":")[2].strip(" =")))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer> 7 </answer>", "7"),
        ("<answer>1</answer> no, <answer>2\n3</answer>.", "2\n3"),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3", r"\boxed{3"),
        (" 7\n", "7"),
        ("", ""),
    ],
)
def test_what_a_response_answers(response, answer):
    assert reasoning_gym.final_answer(response) == answer


def test_a_missing_package_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "reasoning_gym" else find(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'oprd\[reasoning-gym\]'"):
        load_rows(PromptsConfig(SUMS))


@needs_it
def test_training_and_evaluation_have_other_questions():
    data = DataConfig(train=PromptsConfig(SUMS, limit=40), max_prompt_tokens=500)
    tokenizer = bytes_tokenizer()
    train = load_training_prompts(data, tokenizer).prompts
    held_out = load_prompts(data.train, data, tokenizer, for_evaluation=True).prompts
    assert len(held_out) == 40
    texts = [{tokenizer.decode(p.token_ids) for p in prompts} for prompts in (train, held_out)]
    assert not texts[0] & texts[1]
    again = load_training_prompts(data, tokenizer).prompts
    assert [p.token_ids for p in again] == [p.token_ids for p in train]
    other = reasoning_gym.questions(SUMS + "&seed=7", for_evaluation=False, limit=40)
    assert {row["prompt"] for row in other} != texts[0]
    assert all("?max_terms=3&" in p.answer for p in held_out)


@needs_it
def test_scorers_grade_and_what_they_can_not_read_is_wrong():
    rows = reasoning_gym.questions(SUMS, for_evaluation=True, limit=2)
    (factors,) = reasoning_gym.questions("reasoning_gym:prime_factorization", True, limit=1)
    right = solved(rows[0]["prompt"])
    responses = [f"<answer>{right}</answer>", f"so \\boxed{{{right}}}", right, "no idea", "2 x y"]
    answers = [rows[0]["answer"]] * 4 + [factors["answer"]]  # that scorer raises
    with pytest.raises(ValueError, match="invalid literal"):
        reasoning_gym.score("2 x y", factors["answer"])
    grades = grade_all("exact", responses, answers)
    assert [g.right for g in grades] == [True, True, True, False, False]
    assert {g.failed for g in grades} == {None}
    wrong = grade_all("math", [f"\\boxed{{{solved(rows[1]['prompt'])}}}"], [rows[0]["answer"]])
    assert not wrong[0].right


@needs_it
def test_questions_do_not_depend_on_the_hash_seed():
    """Some tasks go through sets. A run that is resumed would get other prompts."""
    code = (
        "from oprd.data.reasoning_gym import questions;"
        "print(questions('reasoning_gym:polynomial_multiplication', False, 5))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


@needs_it
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reasoning_gym:chain_sums", "no task 'chain_sums': did you mean chain_sum"),
        ("reasoning_gym:chain_sum?terms=3", "no setting terms: it has min_terms"),
        ("reasoning_gym:chain_sum?min_terms=9&max_terms=2", "max_terms must be >= min_terms"),
        ("reasoning_gym:chain_sum?seed=-1", "seed must lie in"),
    ],
)
def test_tasks_and_settings_that_do_not_exist(path, message):
    with pytest.raises(ConfigError, match=message):
        load_rows(PromptsConfig(path))


@needs_it
def test_a_task_is_an_evaluation_set(tmp_path):
    cfg = EvalRunConfig(
        models=[save_bytes_model(tmp_path / "model")],
        sets=[SUMS],
        limit=3,
        samples=2,
        max_new_tokens=4,
        output_dir=str(tmp_path / "out"),
    )
    found = evaluate_models(cfg)["models"]["model"]["sets"]["chain_sum"]
    assert (found["problems"], found["avg"], found["ungraded"]) == (3, 0.0, 0)
