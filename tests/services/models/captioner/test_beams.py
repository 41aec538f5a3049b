"""Beam search, compared with transformers' own for each clip and size alone."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.models.captioner.beams import Hypothesis, search

END = 2
SIZES = (1, 2, 3, 5, 8)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=END,
            pad_token_id=END,
        )
        return LlamaForCausalLM(config).eval()


def prompts(seed: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 10, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [1, 20])
def test_every_search_gives_what_transformers_gives(model: LlamaForCausalLM, seed: int, limit: int) -> None:
    embeddings = prompts(seed)
    found = search(model, embeddings, SIZES, end=END, max_new_tokens=limit)
    for clip, row in enumerate(found):
        for size, one in zip(SIZES, row, strict=True):
            output = model.generate(
                inputs_embeds=embeddings[clip : clip + 1],
                num_beams=size,
                do_sample=False,
                max_new_tokens=limit,
                eos_token_id=END,
                pad_token_id=END,
                return_dict_in_generate=True,
                output_scores=True,
            )
            ids = output.sequences[0].tolist()
            assert ids[: len(one.tokens)] == list(one.tokens)
            assert set(ids[len(one.tokens) :]) <= {END}
            if size > 1:
                score = float(output.sequences_scores[0]) * len(one.tokens)
                assert one.log_probability == pytest.approx(score, abs=1e-3)


def test_log_probabilities_are_the_models_own(model: LlamaForCausalLM) -> None:
    """Worked from one pass over prompt and sentence."""
    [[first, *_]] = search(model, prompts(1, 1), (3, 1), end=END, max_new_tokens=20)
    assert first.tokens[-1] == END
    with torch.no_grad():
        words = model.get_input_embeddings()(torch.tensor([first.tokens]))
        logits = model(inputs_embeds=torch.cat([prompts(1, 1), words], dim=1)).logits[0, 9:-1]
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(first.tokens)[:, None])
    assert first.log_probability == pytest.approx(float(chosen.sum()), abs=1e-3)


def test_a_pass_has_no_rows_of_searches_that_are_done(model: LlamaForCausalLM) -> None:
    """The number of rows falls as searches end, down to none."""
    rows: list[int] = []
    handle = model.register_forward_hook(lambda _, __, output: rows.append(len(output.logits)))
    try:
        found = search(model, prompts(0), (1, 2), end=END, max_new_tokens=30)
    finally:
        handle.remove()
    assert rows[:2] == [3, 9]  # one pass over the prompts, however many beams
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert rows[-1] < 9
    assert len(rows) >= max(len(one.tokens) for row in found for one in row)


def test_the_order_of_sizes_and_clips_does_not_matter(model: LlamaForCausalLM) -> None:
    embeddings = prompts(2)
    forward = search(model, embeddings, (2, 4), end=END, max_new_tokens=10)
    backward = search(model, embeddings.flip(0), (4, 2), end=END, max_new_tokens=10)

    def tokens(found: list[list[Hypothesis]]) -> list[list[tuple[int, ...]]]:
        return [[one.tokens for one in row] for row in found]

    assert tokens(forward) == [row[::-1] for row in tokens(backward)[::-1]]


def test_nan_of_one_clip_leaves_the_others(model: LlamaForCausalLM) -> None:
    embeddings = prompts(0)
    alone = search(model, embeddings[[0, 2]], (1, 3), end=END, max_new_tokens=10)
    embeddings[1, 4] = torch.nan
    first, broken, last = search(model, embeddings, (1, 3), end=END, max_new_tokens=10)
    assert [[one.tokens for one in row] for row in (first, last)] == [
        [one.tokens for one in row] for row in alone
    ]
    assert all(one.tokens == () and math.isnan(one.log_probability) for one in broken)
