"""Pipeline folders with other text encoders than T5, and with another upper edge of the spectrogram."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from services.errors import ModelFormatError
from services.models.latent import clip_generator
from services.models.mel import LogMel, mel_filterbank
from services.models.tango.loading import TEXT_ENCODERS, load_tango
from services.models.tango.pipeline import TangoPipeline
from tests.tiny import tiny_pipeline, tiny_tokenizer

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "dim", "d_model"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff"), 32),
    "d_kv": 8,
    "max_position_embeddings": 64,
}


def encoder_of(name: str) -> Any:
    """Return a random text encoder of a permitted class, 16 wide."""
    model = getattr(transformers, name)
    known = model.config_class().to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known}
    torch.manual_seed(0)
    return model(model.config_class(vocab_size=len(tiny_tokenizer()), pad_token_id=0, **sizes))


def pipeline_with(encoder: Any, **settings: Any) -> TangoPipeline:
    tiny = tiny_pipeline()
    parts = {name: getattr(tiny, name) for name in ("tokenizer", "unet", "vae", "vocoder", "scheduler")}
    kept = ("default_duration", "max_duration", "default_num_inference_steps", "default_scheduler")
    own = {name: tiny.config[name] for name in kept}
    return TangoPipeline(**parts, text_encoder=encoder, **(own | settings))


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_a_folder_with_this_text_encoder_is_saved_loaded_and_generates(name: str, tmp_path: Path) -> None:
    pipeline = pipeline_with(encoder_of(name))
    pipeline.save_pretrained(tmp_path / "model")
    loaded = load_tango(tmp_path / "model")
    assert type(loaded.text_encoder).__name__ == name
    ours, theirs = (
        one(["a dog barks", "rain falls then a bell rings"], generator=clip_generator(0)).audios
        for one in (pipeline, loaded)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_padding_does_not_change_the_tokens(name: str) -> None:
    pipeline = pipeline_with(encoder_of(name))
    short, long = (pipeline.encode(["a dog barks"], length=length) for length in (4, 12))
    torch.testing.assert_close(short["embeds"], long["embeds"][:, :4], atol=1e-5, rtol=1e-4)


def test_another_class_is_refused(tmp_path: Path) -> None:
    pipeline_with(encoder_of("BertModel")).save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("BertModel", "GPT2Model"))
    with pytest.raises(ModelFormatError, match=r"text_encoder is a transformers[.]GPT2Model"):
        load_tango(tmp_path / "model")


def test_a_width_that_does_not_fit_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(
        ModelFormatError, match=r"cross_attention_dim is 16 but text_encoder[.]hidden_size is 32"
    ):
        pipeline_with(transformers.BertModel(config))


def test_the_spectrogram_ends_at_the_upper_edge(tmp_path: Path) -> None:
    pipeline = pipeline_with(encoder_of("BertModel"), maximum_hertz=3_000.0)
    pipeline.save_pretrained(tmp_path / "model")
    for one in (pipeline, load_tango(tmp_path / "model")):
        assert torch.equal(one.log_mel().filters, mel_filterbank(maximum_hertz=3_000.0))
    assert torch.equal(tiny_pipeline().log_mel().filters, LogMel().filters)
    tone = torch.sin(2 * torch.pi * 5_000 * torch.arange(16_000) / 16_000)[None]
    narrow, wide = pipeline.log_mel()(tone), LogMel()(tone)
    assert narrow.max() < wide.max() - 3
