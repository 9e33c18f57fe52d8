"""`generate` and vLLM give the same responses, and vLLM has the student's weights."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from oprd.config import SamplingParams
from oprd.engines.generate import GenerateEngine
from oprd.engines.logprob_gap import logprob_gap

pytestmark = pytest.mark.vllm
PROMPTS = [[5, 3, 6, 2], [7, 8, 9, 3, 10, 4], [11], [12, 4, 4, 4, 4]]


def gap(student, rollouts):
    return logprob_gap(
        student, rollouts, last=8, max_tokens=10**6, pad_id=0, device=torch.device("cpu")
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_responses_are_the_same(student, tokenizer, shared, set_weights, seed):
    """Prompts of any length, repeated ones too; responses that end and that are cut."""
    set_weights(seed)
    prompts = [[a, b, c] for a in range(3, 13) for b in (3, 9) for c in range(3, 8)] + PROMPTS * 2
    asked = SamplingParams(max_new_tokens=9, temperature=0.0)
    ours = shared.sample(prompts, asked)
    theirs = GenerateEngine(student, tokenizer).sample(prompts, asked)
    for r in ours:
        assert len(r.log_probs) == len(r.response_ids)
        r.log_probs.clear()
    assert [(r.prompt_ids, r.response_ids, r.truncated) for r in ours] == [
        (r.prompt_ids, r.response_ids, r.truncated) for r in theirs
    ]
    assert len({r.truncated for r in ours}) == 2


def test_every_end_token_ends_a_response_and_padding_may_be_one(
    student, tokenizer, shared, set_weights, monkeypatch
):
    """Those of generation_config; and where pad and EOS are one token, that token is kept."""
    set_weights(2)
    ends = [1, 4, 5, 6]
    monkeypatch.setattr(shared, "ends", ends)
    monkeypatch.setattr(student, "generation_config", GenerationConfig(eos_token_id=ends))
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    prompts = [[a, b] for a in range(3, 13) for b in range(3, 13)]
    asked = SamplingParams(max_new_tokens=9, temperature=0.0)
    ours = shared.sample(prompts, asked)
    theirs = GenerateEngine(student, same).sample(prompts, asked)
    assert [r.response_ids for r in ours] == [r.response_ids for r in theirs]
    assert len({r.response_ids[-1] for r in ours if not r.truncated}) >= 3
    assert all(set(r.response_ids[:-1]).isdisjoint(ends) for r in ours)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.6)])
def test_sampled_tokens_follow_the_students_distribution(
    student, tokenizer, shared, set_weights, temperature, top_p
):
    """Both engines, against the same expectation: chi-square over the first token and, given the
    commonest first token, over the second."""
    set_weights(3)
    n, prompt = 6000, PROMPTS[0]
    asked = SamplingParams(max_new_tokens=2, temperature=temperature, top_p=top_p)
    first = expected(student, prompt, temperature, top_p)
    common = int(first.argmax())
    assert common != 1  # EOS
    second = expected(student, [*prompt, common], temperature, top_p)
    for engine in (shared, GenerateEngine(student, tokenizer)):
        responses = [r.response_ids for r in engine.sample([prompt] * n, asked, seed=0)]
        check_counts([r[0] for r in responses], first)
        check_counts([r[1] for r in responses if r[0] == common], second)


def expected(student, ids, temperature, top_p):
    with torch.no_grad():
        p = (student(torch.tensor([ids])).logits[0, -1] / temperature).double().softmax(-1)
    ordered, order = p.sort(descending=True)
    kept = order[(ordered.cumsum(-1) - ordered) < top_p]
    nucleus = torch.zeros_like(p)
    nucleus[kept] = p[kept]
    return nucleus / nucleus.sum()


def check_counts(tokens, p):
    counts = torch.bincount(torch.tensor(tokens), minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    wanted = p * len(tokens)
    rare = wanted < 5
    wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted, counts = wanted[wanted > 0], counts[wanted > 0]
    assert len(wanted) >= 4
    chi2, freedom = ((counts - wanted) ** 2 / wanted).sum().item(), len(wanted) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 5, (chi2, freedom)


def test_seeds(shared, set_weights):
    set_weights(3)

    def sample(seed):
        asked = SamplingParams(max_new_tokens=6, temperature=1.0)
        return [r.response_ids for r in shared.sample([PROMPTS[0]] * 20, asked, seed=seed)]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = sample(None)
    torch.manual_seed(5)
    assert sample(None) == drawn


def test_the_gap_is_rounding_after_a_sync_and_large_without_one(student, shared, set_weights):
    """The prefix cache, which the first sample fills, must go with the old weights."""
    asked = SamplingParams(max_new_tokens=8, temperature=1.3, top_p=0.9)
    prompts = [[5, 3, 6, 2, 7, 8, 9, 3, 10, 4, 5]] * 40
    set_weights(4)
    shared.sample(prompts, asked, seed=0)
    set_weights(5)
    fresh = gap(student, shared.sample(prompts, asked, seed=0))
    assert fresh.tokens > 40
    assert fresh.max < 1e-4
    set_weights(6, sync=False)
    stale = gap(student, shared.sample(prompts, asked, seed=0))
    assert stale.mean > 0.1


def test_one_optimizer_step_of_staleness_shows(student, shared, set_weights):
    """In float32, at the demo's learning rate."""
    set_weights(7)
    asked = SamplingParams(max_new_tokens=8, temperature=1.0)
    rollouts = shared.sample(PROMPTS * 10, asked, seed=0)
    fresh = gap(student, rollouts)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    student(torch.tensor([PROMPTS[1]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    stale = gap(student, rollouts)
    assert fresh.mean < 1e-5
    assert stale.mean > 5e-3  # the threshold
