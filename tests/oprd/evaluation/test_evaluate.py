"""An evaluation within a run."""

import json

import torch

from oprd.config import EvalConfig
from oprd.data.prompts import Prompt
from oprd.data.rollout import Rollout
from oprd.demo.task import make_tokenizer
from oprd.engines.generate import GenerateEngine
from oprd.evaluation.evaluate import Kept, evaluate
from tests.support.tiny import make_model


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


def test_samples_are_kept_with_their_grades(tmp_path):
    tokenizer = make_tokenizer()
    right, wrong = tokenizer("3")["input_ids"] + [1], tokenizer("44")["input_ids"]
    file = tmp_path / "samples" / "samples_00000004_student_s.jsonl"
    prompts = [Prompt(tokenizer("1+2=")["input_ids"], "3"), Prompt([6], "3")]
    kept = Kept(file, {"step": 4, "model": "student", "set": "s"})
    evaluate(Scripted([right, wrong]), tokenizer, prompts, EvalConfig(), 0, kept)
    first, second = map(json.loads, file.read_text().splitlines())
    assert first == {
        **{"step": 4, "model": "student", "set": "s", "problem": 0, "sample": 0},
        **{"prompt": "1+2=", "response": "3", "answer": "3", "length": 2, "truncated": False},
        **{"score": 1.0, "boxed": None, "failed": None},
    }
    assert (second["response"], second["truncated"], second["score"]) == ("44", True, 0.0)
