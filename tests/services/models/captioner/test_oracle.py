"""Every number that upstream's own code produced, stage by stage, from a converted checkpoint.

Tolerances are the references' own: 1e-4, the loss 1e-5, ids and labels exact. One clip is padded, one cut.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.models.captioner.beams import search
from services.models.captioner.eat import sincos_positions
from services.models.captioner.model import CaptionClip, Captioner, fit_frames
from tests.services.models.captioner.released import CAPTIONS, eat_weights, references

AUDIO = 102
"""Audio tokens of a clip."""


@pytest.fixture(scope="module")
def ref() -> dict[str, NDArray[Any]]:
    return references()


@pytest.fixture(scope="module")
def clips(converted: Captioner, ref: dict[str, NDArray[Any]]) -> list[CaptionClip]:
    return [converted.prepare(ref[f"waveform_{name}"], 16_000) for name in "ab"]


@pytest.fixture(scope="module")
def mels(ref: dict[str, NDArray[Any]]) -> Tensor:
    return torch.from_numpy(ref["mel"])


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def near(found: Tensor, wanted: NDArray[Any], tolerance: float = 1e-4) -> None:
    assert found.shape == wanted.shape
    assert float((found - torch.from_numpy(wanted)).abs().max()) <= tolerance


def exactly(found: Tensor, wanted: NDArray[Any]) -> None:
    assert np.array_equal(found.numpy(), wanted)


def test_mels(converted: Captioner, clips: list[CaptionClip], ref: dict[str, NDArray[Any]]) -> None:
    near(converted.mels(clips), ref["mel"])
    padding = converted.mels(clips)[0, 300:]
    near(padding, np.full_like(padding, 4.268 / 9.138))  # not 0: padding comes before normalisation


def test_mels_of_variable_length(
    converted: Captioner, clips: list[CaptionClip], ref: dict[str, NDArray[Any]]
) -> None:
    mel_TM = fit_frames(converted.filterbank(clips[0].waveform_N), converted.config, fixed=False)
    near(mel_TM, ref["mel_variable_a"])
    near(converted.encoder(mel_TM[None]), ref["encoder_variable_a"])


def test_patches_and_positions(converted: Captioner, mels: Tensor, ref: dict[str, NDArray[Any]]) -> None:
    patches_BPD = converted.encoder.embed(mels)
    near(patches_BPD, ref["patch_embed"])
    near(converted.encoder.place(patches_BPD), ref["after_pos_cls_prenorm"])


def test_positions_of_new_models_are_those_of_the_checkpoint() -> None:
    stored = eat_weights()["model.modality_encoders.IMAGE.fixed_positional_encoder.positions"]
    near(sincos_positions(80, 8, 64)[None], stored.numpy(), 1e-5)


def test_encoder(converted: Captioner, mels: Tensor, ref: dict[str, NDArray[Any]]) -> None:
    near(converted.encoder(mels), ref["encoder"])


def test_projector(converted: Captioner, ref: dict[str, NDArray[Any]]) -> None:
    near(converted.projector(torch.from_numpy(ref["encoder"])), ref["projector"])
    assert ref["projector"].shape[1] == AUDIO


def test_the_way_from_sound_to_audio_tokens(
    converted: Captioner, clips: list[CaptionClip], ref: dict[str, NDArray[Any]]
) -> None:
    near(converted.encode(clips), ref["projector"])


def test_layout_of_training(converted: Captioner, ref: dict[str, NDArray[Any]]) -> None:
    ids, _, mask = converted.tokenize(CAPTIONS)
    exactly(ids, ref["train_input_ids"][:, AUDIO:])
    exactly(mask, ref["train_attention_mask"][:, AUDIO:])
    assert (ref["train_input_ids"][:, :AUDIO] == -1).all()  # upstream's places of audio
    embeddings, all_labels, all_mask = converted.layout(torch.from_numpy(ref["projector"]), CAPTIONS)
    exactly(all_labels, ref["train_labels"])
    exactly(all_mask, ref["train_attention_mask"])
    near(embeddings, ref["train_inputs_embeds"])
    modality = ref["train_modality_mask"]
    assert modality[:, :AUDIO].all() and not modality[:, AUDIO:].any()


def test_loss(converted: Captioner, mels: Tensor, ref: dict[str, NDArray[Any]]) -> None:
    output = converted(mels, CAPTIONS)
    heard = torch.from_numpy(ref["train_attention_mask"])
    near(output.logits_BLV[heard], ref["train_logits"][ref["train_attention_mask"]])
    near(output.loss, ref["train_loss"], 1e-5)
    assert output.accuracy == pytest.approx(float(ref["train_acc"]), abs=1e-6)


def test_prompt_of_inference(converted: Captioner, ref: dict[str, NDArray[Any]]) -> None:
    prompt = converted.prompt_ids()
    assert ref["infer_input_ids"][:, AUDIO:].tolist() == [prompt, prompt]
    assert ref["infer_attention_mask"].all()
    modality = ref["infer_modality_mask"]
    assert modality[:, :AUDIO].all() and not modality[:, AUDIO:].any()
    near(converted.prompts(torch.from_numpy(ref["projector"])), ref["infer_inputs_embeds"])


@pytest.mark.parametrize("beams", [1, 2, 3, 8])
def test_generated_tokens(converted: Captioner, ref: dict[str, NDArray[Any]], beams: int) -> None:
    prompts_BLD = torch.from_numpy(ref["infer_inputs_embeds"])
    found = search(converted.language_model, prompts_BLD, (beams,), end=2, max_new_tokens=12)
    for [one], wanted in zip(found, ref[f"generate_beam{beams}"].tolist(), strict=True):
        assert list(one.tokens) == wanted[: len(one.tokens)]
        assert set(wanted[len(one.tokens) :]) <= {2}


def test_captions_of_clips(
    converted: Captioner, clips: list[CaptionClip], ref: dict[str, NDArray[Any]]
) -> None:
    audio = converted.encode(clips)
    captions = converted.generate(audio, beams=(1, 2, 3, 8), max_new_tokens=12)
    for row, clip in zip(captions, range(2), strict=True):
        wanted = [ref[f"generate_beam{beams}"][clip] for beams in (1, 2, 3, 8)]
        decode = converted.tokenizer.decode
        assert [one.text for one in row] == [decode(ids, skip_special_tokens=True).strip() for ids in wanted]
