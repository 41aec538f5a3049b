"""AudioGenX: upstream's numbers, and our form with history."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from services.models.audiogen.audiogenx import (
    MaskGenerators,
    audiogenx_losses,
    learn_mask,
    relaxed,
    states_under,
)
from services.models.audiogen.masking import masked_attention, masked_states
from services.models.audiogen.pipeline import AudioGenPipeline
from tests.services.models.audiogen.released import FIXTURES, oracle

STATES: dict[str, Any] = {"atol": 1e-5, "rtol": 0.0}
LOSSES: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in oracle().items()}


def upstream_generators() -> MaskGenerators:
    """The generators before the first step, of upstream's list of networks."""
    weights = load_file(FIXTURES / "maskgen_init.safetensors")
    generators = MaskGenerators(9, 32)

    def stacked(name: str) -> Tensor:
        return torch.stack([weights[f"{step}.mlp.{name}"] for step in range(9)])

    state = {
        "weight_SWH": stacked("0.weight").transpose(1, 2),
        "bias_SH": stacked("0.bias"),
        "slope_S": stacked("1.weight")[:, 0],
        "output_SH": stacked("2.weight")[:, 0],
        "output_bias_S": stacked("2.bias")[:, 0],
    }
    generators.load_state_dict(state)
    return generators


@pytest.mark.parametrize("complement", [False, True])
@torch.no_grad()
def test_a_masked_pass_has_upstreams_states(
    converted: AudioGenPipeline, expected: dict[str, Tensor], complement: bool
) -> None:
    mask = expected["mask_given_time"]
    name, mask = ("invmask", 1 - mask) if complement else ("mask", mask)
    sequence, text = expected["sequence"][0, :, :-1], expected["text_emb"]
    with masked_attention(converted.decoder):
        (states,) = states_under(converted.decoder, sequence, text, (mask,), history=True)
        (alone,) = states_under(converted.decoder, sequence, text, (mask,), history=False)
        same = expected["mask_given"] if not complement else 1 - expected["mask_given"]
        full = masked_states(converted.decoder, sequence[None], text[None], same.expand(1, 9, 5))
    assert_close(states, expected[f"stream_{name}_time_hidden"][0], **STATES)
    assert_close(alone, expected[f"explain_{name}_time_hidden"][:9, 0], **STATES)
    assert_close(full, expected[f"full_{name}_hidden_cond"], **STATES)


@torch.no_grad()
def test_losses_are_upstreams(converted: AudioGenPipeline, expected: dict[str, Tensor]) -> None:
    mask, target = expected["mask_given_time"], expected["stream_nomask_hidden"][0]
    sequence, text = expected["sequence"][0, :, :-1], expected["text_emb"]
    with masked_attention(converted.decoder):
        for history, name in ((False, "losses_mask_time"), (True, "history_losses_mask_time")):
            kept, lost = states_under(converted.decoder, sequence, text, (mask, 1 - mask), history=history)
            found = torch.tensor(audiogenx_losses(target, kept, lost, mask).values())
            wanted = expected[name].float()
            assert_close(found[: len(wanted)], wanted, **LOSSES)


def test_upstreams_mode_reproduces_five_steps(
    converted: AudioGenPipeline, expected: dict[str, Tensor]
) -> None:
    generators = upstream_generators()
    noise = expected["opt_gumbel"][:, :, :, 0]
    learned = learn_mask(
        converted.decoder,
        expected["sequence"][0, :, :-1],
        expected["text_emb"],
        expected["stream_nomask_hidden"][0],
        generators=generators,
        noise=lambda iteration: noise[iteration],
        iterations=5,
        history=False,
    )
    assert_close(torch.tensor(learned.trace), expected["opt_trace"].float(), **LOSSES)
    assert_close(learned.p_SL, expected["opt5_params"], **LOSSES)
    assert_close(relaxed(learned.p_SL, noise[5]), expected["opt5_mask"], **LOSSES)


def test_with_history_no_mask_is_the_target_and_without_it_is_not(
    converted: AudioGenPipeline, expected: dict[str, Tensor]
) -> None:
    """Upstream's factual loss can't reach -S: its states lack the history of the target."""
    sequence, text = expected["sequence"][0, :, :-1], expected["text_emb"]
    target, ones = expected["stream_nomask_hidden"][0], torch.ones(9, 5)
    with torch.no_grad(), masked_attention(converted.decoder):
        for history, low, high in ((True, -9.0001, -8.9999), (False, -7.0, -6.0)):
            (kept,) = states_under(converted.decoder, sequence, text, (ones,), history=history)
            assert low < audiogenx_losses(target, kept, kept, ones).values()[0] < high


def test_the_attention_is_as_before_after_a_fault(converted: AudioGenPipeline) -> None:
    before = converted.decoder.config._attn_implementation
    with pytest.raises(ZeroDivisionError), masked_attention(converted.decoder):
        raise ZeroDivisionError
    assert converted.decoder.config._attn_implementation == before
