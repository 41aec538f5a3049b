"""The three methods on functions with a closed form, and on tiny random denoisers.

Shapes: B rows, C channels, T latent frames, F latent mel bins, L text tokens, W words, H heads, Q queries.
"""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from services.audio.words import find_words
from services.errors import RequestCancelledError, UnsupportedError
from services.models.explaining.cross_attention import cross_attention_layers, edited
from services.models.explaining.methods import Points, attention, grid_of, learned_mask, occlusion, without
from services.models.explaining.tokens import tokens_of_words
from services.models.latent import Conditioning
from services.models.tango.pipeline import TangoPipeline, velocity
from tests.tiny import tiny_pipeline, tiny_tangoflux, tiny_tokenizer

PROMPT = "A dog barks, then a siren wails"
TOKENS = 4
OWNERS_WL = torch.tensor([[True, False, False, False], [False, True, True, False]])
"""Two words: one of one token and one of two. The last token is the end."""


def text_of(values_L: Tensor) -> Conditioning:
    mask_1L = torch.ones((1, len(values_L)), dtype=torch.bool)
    return Conditioning(tensors={"embeds": values_L.view(1, -1, 1), "mask": mask_1L})


def points_of(count: int = 2, frames: int = 4, bins: int = 2, channels: int = 3) -> Points:
    generator = torch.Generator().manual_seed(1)
    return Points(
        latents_SX=torch.randn((count, channels, frames, bins), generator=generator),
        timesteps_S=torch.linspace(900, 100, count),
        seconds=0.64,
    )


def one_token_per_frame(latents_BX: Tensor, t_B: Tensor, text: Conditioning, seconds_B: Tensor) -> Tensor:
    """Add to frame t the value of token t, if it is not masked."""
    values_BL = text["embeds"][..., 0] * text["mask"]
    return latents_BX + values_BL[:, None, :, None]


def test_occlusion_is_the_squared_change_of_the_frames_that_a_word_makes() -> None:
    text = text_of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    matrix_WT = occlusion(one_token_per_frame, points_of(), text, OWNERS_WL)
    expected_WT = torch.tensor([[1.0, 0, 0, 0], [0, 4.0, 9.0, 0]])
    torch.testing.assert_close(matrix_WT, expected_WT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 99])
def test_occlusion_is_the_same_in_parts(max_rows: int) -> None:
    calls: list[int] = []

    def denoise(latents_BX: Tensor, t_B: Tensor, text: Conditioning, seconds_B: Tensor) -> Tensor:
        calls.append(len(latents_BX))
        return one_token_per_frame(latents_BX, t_B, text, seconds_B)

    ticks: list[None] = []
    text = text_of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    found = occlusion(denoise, points_of(3), text, OWNERS_WL, lambda: ticks.append(None), max_rows=max_rows)
    torch.testing.assert_close(found, occlusion(one_token_per_frame, points_of(3), text, OWNERS_WL))
    assert max(calls) == min(max_rows, 3) and sum(calls) == 9 and len(ticks) == len(calls)


def test_masked_tokens_are_masked_in_one_row_only() -> None:
    text = text_of(torch.arange(4.0))
    rows = without(text, OWNERS_WL)
    assert rows["mask"].tolist() == [[False, True, True, True], [True, False, False, True]]
    assert text["mask"].all()


@pytest.mark.parametrize(("queries", "expected"), [(32, (8, 4)), (8, (4, 2)), (2, (2, 1))])
def test_the_grid_of_a_layer_is_the_latents_halved(queries: int, expected: tuple[int, int]) -> None:
    assert grid_of(queries, 8, 4) == expected


def test_another_grid_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="7 queries"):
        grid_of(7, 8, 4)


def test_words_have_their_tokens_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    owners_WL = tokens_of_words(tokenizer, PROMPT, find_words(PROMPT), 12)
    ids = tokenizer(PROMPT)["input_ids"]
    names = [[tokenizer.decode([ids[i]]) for i in row_L.nonzero()[:, 0]] for row_L in owners_WL]
    assert names == [["a"], ["dog"], ["barks"], ["then"], ["a"], ["siren"], ["wails"]]
    # The comma, the end token and the padding are nobody's.
    assert owners_WL.sum() == 7 and owners_WL.shape == (7, 12)


def test_unknown_and_truncated_words_have_rows() -> None:
    prompt = "a zebra's dog barks"
    owners_WL = tokens_of_words(tiny_tokenizer(), prompt, find_words(prompt), 4)
    # "zebra's" is three unknown tokens, of which the third is cut to make room for the end.
    assert owners_WL.tolist() == [
        [True, False, False, False],
        [False, True, True, False],
        [False, False, False, False],
        [False, False, False, False],
    ]


@pytest.fixture
def tiny() -> TangoPipeline:
    return tiny_pipeline()


def inputs(pipeline: TangoPipeline) -> tuple[Points, Conditioning, Tensor]:
    text = pipeline.encode([PROMPT], length=16)
    owners_WL = tokens_of_words(pipeline.tokenizer, PROMPT, find_words(PROMPT), 16)
    return points_of(2, frames=16, bins=16, channels=4), text, owners_WL


def denoiser_of(unet: UNet2DConditionModel) -> Callable[..., Tensor]:
    return lambda latents_BX, t_B, text, s_B: velocity(unet, latents_BX, t_B, text)


def weights_seen(pipeline: TangoPipeline, points: Points, text: Conditioning) -> list[Tensor]:
    seen: list[Tensor] = []

    def edit(weights_BHQL: Tensor) -> Tensor:
        seen.append(weights_BHQL)
        return weights_BHQL

    with edited(pipeline.unet, edit), torch.no_grad():
        denoiser_of(pipeline.unet)(points.latents_SX[:1], points.timesteps_S[:1], text, None)
    return seen


def test_attention_is_the_mean_weight_of_a_words_tokens(tiny: TangoPipeline) -> None:
    points, text, owners_WL = inputs(tiny)
    with torch.no_grad():
        matrix_WT = attention(tiny.unet, denoiser_of(tiny.unet), points.spread(1), text, owners_WL)
    # By hand: layers of 8 frames and 8 bins, each frame twice.
    seen = weights_seen(tiny, points.spread(1), text)
    expected_TL = torch.stack([w.mean((0, 1)).view(8, 8, 16).mean(1) for w in seen]).mean(0)
    expected_WT = (owners_WL.float() @ expected_TL.T).repeat_interleave(2, 1)
    torch.testing.assert_close(matrix_WT, expected_WT)
    # With the end token and the comma, which are left out, the columns add up to 1.
    rest_T = expected_TL[:, ~owners_WL.any(0)].sum(1).repeat_interleave(2)
    torch.testing.assert_close(matrix_WT.sum(0) + rest_T, torch.ones(16))
    assert (matrix_WT >= 0).all()


def test_padding_gets_no_weight(tiny: TangoPipeline) -> None:
    points, text, _ = inputs(tiny)
    for weights_BHQL in weights_seen(tiny, points, text):
        assert weights_BHQL[..., ~text["mask"][0]].max() < 1e-6


def test_weights_that_are_read_only_change_nothing_but_rounding(tiny: TangoPipeline) -> None:
    points, text, _ = inputs(tiny)
    denoise = denoiser_of(tiny.unet)
    with torch.no_grad():
        before = denoise(points.latents_SX, points.timesteps_S, text.repeat_interleave(2), None)
        with edited(tiny.unet, lambda weights: weights):
            within = denoise(points.latents_SX, points.timesteps_S, text.repeat_interleave(2), None)
        after = denoise(points.latents_SX, points.timesteps_S, text.repeat_interleave(2), None)
    torch.testing.assert_close(within, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(before, after)


def test_hooks_are_taken_off_whatever_happens(tiny: TangoPipeline) -> None:
    points, text, owners_WL = inputs(tiny)
    layers = cross_attention_layers(tiny.unet)
    before = [(layer.processor, layer.get_attention_scores.__func__) for layer in layers]
    ticks = iter(range(1))

    def tick() -> None:
        if next(ticks, None) is None:
            raise RequestCancelledError("cancelled")

    denoise = denoiser_of(tiny.unet)
    for run in (
        lambda: attention(tiny.unet, denoise, points, text, owners_WL, tick),
        lambda: learned_mask(tiny.unet, denoise, points, text, owners_WL, tick),
    ):
        ticks = iter(range(1))
        with pytest.raises(RequestCancelledError):
            run()
        assert [(layer.processor, layer.get_attention_scores.__func__) for layer in layers] == before
        assert not any("get_attention_scores" in vars(layer) for layer in layers)


def test_a_denoiser_without_cross_attention_is_refused() -> None:
    flux = tiny_tangoflux()
    assert not cross_attention_layers(flux.transformer)
    with (
        pytest.raises(UnsupportedError, match="no layers of cross-attention"),
        edited(flux.transformer, lambda weights: weights),
    ):
        pass


def test_a_mask_keeps_what_is_needed_and_leaves_out_the_rest(tiny: TangoPipeline) -> None:
    points, text, owners_WL = inputs(tiny)
    denoise = denoiser_of(tiny.unet)
    found = learned_mask(tiny.unet, denoise, points, text, owners_WL, iterations=30)
    assert found.mask_WT.shape == (7, 16)
    assert found.mask_WT.min() > 0 and found.mask_WT.max() < 1
    assert 1 <= found.iterations <= 30
    # Half of every weight, the start, keeps and leaves out half of what a linear layer adds: 1/4 each.
    assert found.factual + found.counterfactual < 0.5
    assert all(p.grad is None for p in tiny.unet.parameters())


def test_a_mask_finds_the_words_that_a_frame_needs(tiny: TangoPipeline) -> None:
    points, text, owners_WL = inputs(tiny)
    # Only "dog" has a value; the others' tokens are like an empty one.
    embeds = torch.zeros_like(text["embeds"])
    embeds[:, owners_WL[1]] = 4 * text["embeds"][:, owners_WL[1]]
    found = learned_mask(
        tiny.unet, denoiser_of(tiny.unet), points, text.embedded(embeds), owners_WL, iterations=60
    )
    means_W = found.mask_WT.mean(1)
    assert means_W.argmax() == 1
    assert means_W[1] > 0.6 and means_W[[0, 2, 3, 4, 5, 6]].max() < 0.5


def test_a_text_that_changes_nothing_has_an_empty_mask(tiny: TangoPipeline) -> None:
    points, text, owners_WL = inputs(tiny)
    silent = text.embedded(torch.zeros_like(text["embeds"]))
    found = learned_mask(tiny.unet, denoiser_of(tiny.unet), points, silent, owners_WL)
    assert found.iterations == 0 and not found.mask_WT.any()
