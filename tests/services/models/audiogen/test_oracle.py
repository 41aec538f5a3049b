"""The converted model computes what upstream's code computes (tests/fixtures/audiogen)."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from services.models.audiogen.language_model import PrefixCache, heads, hidden_states, token_logits
from services.models.audiogen.pattern import delayed, is_code, undelayed
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.latent import Conditioning, guide
from tests.services.models.audiogen.released import CODES, codec_weights, oracle

TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in oracle().items()}


def text_pair(pipeline: AudioGenPipeline, expected: dict[str, Tensor]) -> Tensor:
    """The null condition and the oracle's text, projected: [2, L, W]."""
    raw_1LD = expected["text_raw"][None]
    return pipeline.projection(torch.cat([torch.zeros_like(raw_1LD), raw_1LD]))


def test_the_pattern_is_upstreams(expected: dict[str, Tensor]) -> None:
    sequence = delayed(expected["codes"], CODES)
    assert torch.equal(sequence, expected["sequence"])
    assert torch.equal(undelayed(sequence), expected["codes"])
    assert torch.equal(is_code(sequence.shape[2], 4), sequence[0] != CODES)


def test_the_projection_keeps_zeros_and_projects_text(
    converted: AudioGenPipeline, expected: dict[str, Tensor]
) -> None:
    null, text = text_pair(converted, expected)
    assert not null.any()
    assert_close(text, expected["text_emb"], **TOLERANCE)


@torch.no_grad()
def test_one_causal_pass_has_upstreams_states_and_logits(
    converted: AudioGenPipeline, expected: dict[str, Tensor]
) -> None:
    sequence = expected["sequence"][..., :-1].repeat(2, 1, 1)
    states = hidden_states(converted.decoder, sequence, text_pair(converted, expected))
    assert_close(states[1:], expected["full_nomask_hidden_cond"], **TOLERANCE)
    uncond, cond = heads(converted.decoder, states).split(1)
    assert_close(cond, expected["full_nomask_logits_cond"], **TOLERANCE)
    assert_close(uncond, expected["full_nomask_logits_uncond"], **TOLERANCE)
    assert_close(guide(uncond, cond, 3.0), expected["full_nomask_logits_cfg3"], **TOLERANCE)


@torch.no_grad()
def test_step_by_step_has_upstreams_states(converted: AudioGenPipeline, expected: dict[str, Tensor]) -> None:
    cache, text = PrefixCache(converted.decoder), text_pair(converted, expected)
    sequence = expected["sequence"].repeat(2, 1, 1)
    for step in range(1, sequence.shape[-1]):
        states = cache.states(sequence[..., :step], text)
    assert_close(states.flip(0), expected["stream_nomask_hidden"], **TOLERANCE)


def test_padded_text_is_zero_and_not_masked(converted: AudioGenPipeline) -> None:
    """Trap: with an attention mask the logits differ by almost 1."""
    padding = {name: torch.from_numpy(array) for name, array in oracle("padding").items()}
    sequence = torch.from_numpy(oracle()["sequence"])[..., :-1]
    with torch.no_grad():
        logits = token_logits(converted.decoder, sequence, padding["text_emb"])
        masked = converted.decoder(
            sequence.flatten(0, 1),
            encoder_hidden_states=padding["text_emb"],
            encoder_attention_mask=padding["attention_mask"].long(),
        ).logits.unflatten(0, (1, 4))
    assert_close(logits, padding["logits"], **TOLERANCE)
    assert (masked - padding["logits"]).abs().max() > 0.5


def test_the_engines_call_gives_the_next_steps_logits_at_each_rows_own_step(
    converted: AudioGenPipeline, expected: dict[str, Tensor]
) -> None:
    raw = expected["text_raw"][None].repeat(3, 1, 1)
    text = Conditioning(tensors={"embeds": raw, "mask": torch.ones(3, 5, dtype=torch.bool)})
    latents = expected["sequence"].float().repeat(3, 1, 1)
    steps = torch.tensor([0.0, 7.0, 3.0])
    logits = converted.predict(latents, steps, text)
    wanted = expected["full_nomask_logits_cond"][0]
    for row, step in zip(logits, steps.long(), strict=True):
        assert_close(row, wanted[:, step], **TOLERANCE)


@torch.no_grad()
def test_the_codec_has_upstreams_latents_and_waveform(converted: AudioGenPipeline) -> None:
    seanet = {name: torch.from_numpy(array) for name, array in oracle("seanet").items()}
    assert_close(converted.codec.encoder(seanet["x"]), seanet["z"], **TOLERANCE)
    assert_close(converted.codec.decoder(seanet["z"]), seanet["y"], **TOLERANCE)


@torch.no_grad()
def test_the_quantizer_takes_the_nearest_code_of_what_is_left(converted: AudioGenPipeline) -> None:
    """Upstream's arithmetic (quantization/core_vq.py), written out."""
    x, z = (oracle("seanet")[name] for name in "xz")
    weights = codec_weights()
    rest, wanted = z[0].T.copy(), []
    for number in range(4):
        book = weights[f"quantizer.vq.layers.{number}._codebook.embed"].numpy()
        nearest = np.square(rest[:, None] - book[None]).sum(-1).argmin(-1)
        wanted.append(nearest)
        rest -= book[nearest]
    codes = converted.codec.encode(torch.from_numpy(x)).audio_codes
    assert codes.shape == (1, 1, 4, 10)
    assert np.array_equal(codes[0, 0].numpy(), np.stack(wanted))
    decoded = converted.codec.decode(codes, [None]).audio_values
    wanted_waveform = converted.codec.decoder(torch.from_numpy((z[0].T - rest).T[None]))
    assert_close(decoded, wanted_waveform, atol=1e-4, rtol=0.0)
