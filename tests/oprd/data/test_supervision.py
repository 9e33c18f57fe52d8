"""Supervised positions, rollouts and batches."""

import pytest
import torch

from oprd.config import SamplingParams
from oprd.data.collate import collate
from oprd.data.rollout import Rollout
from oprd.data.supervision import generated_masks, supervise
from oprd.demo.task import make_tokenizer
from oprd.engines.generate import generate
from tests.support.tiny import make_model

# Two sequences of six: prompts of 2 and 1 tokens, responses of 3 and 5 (None: padding).
RESPONSE = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("positions", "k", "rows"),
    [
        ("all", 1, [2, 3, 4, 7, 8, 9, 10, 11]),
        ("last", 4, [4, 11]),
        ("last_k", 2, [3, 4, 10, 11]),
        ("last_k", 4, [2, 3, 4, 8, 9, 10, 11]),
        ("first_k", 2, [2, 3, 7, 8]),
        ("first_k", 99, [2, 3, 4, 7, 8, 9, 10, 11]),
    ],
)
def test_rows(positions, k, rows):
    after = supervise(RESPONSE, positions, k, "after")
    before = supervise(RESPONSE, positions, k, "before")
    assert after.rows.tolist() == rows
    assert before.rows.tolist() == [r - 1 for r in rows]
    assert after.total == len(rows)
    assert after.weights is None


def test_seq_mean_weights_every_rollout_alike():
    mask = torch.cat([RESPONSE, torch.zeros(1, 6, dtype=torch.bool)])
    chosen = supervise(mask, "all", reduction="seq-mean")
    assert chosen.total == 2  # the third has no response
    assert chosen.weights.tolist() == pytest.approx([1 / 3] * 3 + [1 / 5] * 5)


def test_before_needs_a_prompt():
    with pytest.raises(ValueError, match="starts at position 0"):
        supervise(torch.ones(1, 3, dtype=torch.bool), "all", shift="before")
    chosen = supervise(torch.ones(1, 3, dtype=torch.bool), "last", shift="before")
    assert chosen.rows.tolist() == [1]


def test_collate_masks_by_place_not_by_token():
    """pad == eos: the EOS of a response is supervised, once, and padding never is."""
    rollouts = [Rollout([5, 6], [7, 0], False), Rollout([5], [8, 9, 9, 9], True)]
    batch = collate(rollouts, pad_id=0, device="cpu")
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [5, 8, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[False, False, True, True, False], [False] + [True] * 4]


@pytest.fixture
def model():
    """The demo's tokenizer has 15 tokens; EOS is 1, padding 0."""
    return make_model("qwen2", vocab_size=15, eos_token_id=1).eval()


def test_greedy_generation_is_what_the_model_prefers_padding_or_not(model):
    tokenizer = make_tokenizer()
    prompts = [[5, 3, 6], [7, 8, 9, 3, 10, 4], [11]]
    for batch_size in (None, 1, 2):
        rollouts = generate(
            model, tokenizer, prompts, SamplingParams(6, temperature=0), batch_size=batch_size
        )
        assert [r.prompt_ids for r in rollouts] == prompts  # in the order they came in
        for r in rollouts:
            ids = torch.tensor([r.prompt_ids + r.response_ids])
            with torch.no_grad():
                best = model(ids).logits[0, len(r.prompt_ids) - 1 : -1].argmax(-1)
            assert best.tolist() == r.response_ids
            assert r.truncated == (r.response_ids[-1] != 1)


def test_sampling_follows_the_models_own_distribution(model):
    """Top-k 50, the library's default, and the model's generation settings play no part."""
    tokenizer = make_tokenizer()
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    torch.manual_seed(0)
    n = 4000
    rollouts = generate(model, tokenizer, [[5, 3, 6]] * n, SamplingParams(1, temperature=2.0))
    counts = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=15)
    with torch.no_grad():
        p = (model(torch.tensor([[5, 3, 6]])).logits[0, -1] / 2.0).softmax(-1)
    deviation = (counts / n - p).abs() / (p * (1 - p) / n).sqrt()
    assert deviation.max() < 4.5  # standard deviations, 15 tokens
    assert model.generation_config.top_k == 1


def test_generation_uses_every_end_token_and_restores_the_mode(model):
    tokenizer = make_tokenizer()
    model.generation_config.eos_token_id = list(range(2, 15))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rollouts = generate(model, tokenizer, [[5, 3]] * 8, SamplingParams(max_new_tokens=9))
    assert model.training
    assert all(len(r.response_ids) == 1 or r.response_ids[0] == 0 for r in rollouts)


def test_masks_of_generated_sequences():
    """Prompts of 3 tokens padded on the left; 1 and 9 end a response, and 1 is also the padding."""
    sequences = torch.tensor(
        [[1, 5, 6, 7, 9, 1, 1], [1, 1, 5, 1, 1, 1, 1], [5, 1, 6, 7, 8, 7, 8], [5, 6, 7, 8, 1, 9, 4]]
    )
    prompts = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1]])
    attention, response = generated_masks(sequences, prompts, [1, 9])
    assert response.tolist() == [
        [bool(x) for x in row]
        for row in (
            [0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 1, 1, 1, 1],
            [0, 0, 0, 1, 1, 0, 0],
        )
    ]
    assert torch.equal(attention[:, :3], prompts)
    assert torch.equal(attention[:, 3:], response[:, 3:].long())
    _, one_end = generated_masks(sequences, prompts, 9)
    assert one_end.sum(-1).tolist() == [2, 4, 4, 3]
    _, endless = generated_masks(sequences, prompts, None)
    assert endless[:, 3:].all()
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        generated_masks(sequences, prompts.flip(-1), 9)
    with pytest.raises(ValueError, match=r"prompt_mask has shape \(4, 9\) for sequences \(4, 7\)"):
        generated_masks(sequences, torch.ones(4, 9), 9)
