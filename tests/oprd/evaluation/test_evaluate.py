"""Grading and the numbers an evaluation reports."""

import pytest
import torch

from oprd.config import EvalConfig
from oprd.data.prompts import Prompt
from oprd.data.rollout import Rollout
from oprd.demo.task import make_tokenizer
from oprd.engines.generate import GenerateEngine
from oprd.evaluation.evaluate import evaluate
from oprd.evaluation.grading import exact, last_boxed, math
from oprd.evaluation.metrics import distinct_4grams
from tests.support.tiny import make_model


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so \boxed{142}", "142.0", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"first \boxed{3}, no: \boxed{x+1}", "1+x", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{\text{A}}", "A", True),
        (r"\boxed{7}", "8", False),
        (r"\boxed{12", "12", False),
        ("12", "12", False),
        (r"\boxed{}", "3", False),
        ("", "3", False),
    ],
)
def test_math_grader(response, answer, right):
    assert math(response, answer) is right


def test_exact_grader_and_last_boxed():
    assert exact(" 207\n", "207")
    assert not exact("2070", "207")
    assert last_boxed(r"\boxed{a{b}c} and \boxed{d}") == "d"
    assert last_boxed(r"\boxed{a{b}c}") == "a{b}c"
    assert last_boxed(r"\boxed{a{b}") is None


def test_distinct_4grams_are_pooled_over_a_prompts_responses():
    assert distinct_4grams(["a b c d"]) == 100
    assert distinct_4grams(["a b c d", "a b c d"]) == 50
    assert distinct_4grams(["a b c d e", "x"]) == 100
    assert distinct_4grams(["a b c"]) is None


class Scripted:
    """An engine with its responses given."""

    device = torch.device("cpu")

    def __init__(self, responses):
        self.responses = responses

    def sample(self, prompts, sampling, seed):
        pairs = zip(prompts, self.responses, strict=True)
        return [Rollout(p, r, truncated=r[-1] != 1) for p, r in pairs]


def test_evaluate_averages_and_takes_the_best():
    tokenizer = make_tokenizer()
    right, wrong = tokenizer("3")["input_ids"] + [1], tokenizer("44")["input_ids"]
    cfg = EvalConfig(samples=2, temperature=1.0)
    engine = Scripted([right, wrong, wrong, wrong])
    result = evaluate(engine, tokenizer, [Prompt([5], "3"), Prompt([6], "3")], cfg)
    assert (result.avg, result.best) == (0.25, 0.5)
    assert result.length == 2
    assert result.truncated == 0.75
    assert result.metrics("s") == {
        "val/s/avg@2": 0.25,
        "val/s/best@2": 0.5,
        "val/s/len": 2.0,
        "val/s/truncated": 0.75,
        "val/s/avg@2_stderr": 0.25,
        "val/s/pass^2": 0.0,
    }


def test_evaluation_does_not_touch_the_random_state():
    tokenizer = make_tokenizer()
    engine = GenerateEngine(make_model("qwen2", vocab_size=15), tokenizer)
    cfg = EvalConfig(samples=2, temperature=1.0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = evaluate(engine, tokenizer, [Prompt([5], "3")] * 20, cfg)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == evaluate(engine, tokenizer, [Prompt([5], "3")] * 20, cfg)
