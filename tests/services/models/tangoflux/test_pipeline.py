"""`TangoFluxPipeline` on a tiny random model.

Shape legend: B batch, T latent frames, C latent channels, L text tokens, N samples.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from services.engine import Engine, EngineConfig
from services.errors import InvalidInputError, ModelFormatError
from services.models.architectures import architecture_of, check_generator, load_generator
from services.models.latent import Conditioning, clip_generator
from services.models.mel import mel_filterbank
from services.models.state_dicts import quiet_loading
from services.models.tango.loading import load_tango
from services.models.tangoflux.pipeline import TangoFluxPipeline
from tests.tiny import tiny_tangoflux

PROMPT = "a dog barks"
SECONDS = torch.tensor([0.64])


@pytest.fixture(scope="module")
def flux() -> TangoFluxPipeline:
    return tiny_tangoflux()


@pytest.fixture(scope="module")
def saved(flux: TangoFluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "flux"
    flux.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_call_makes_the_engines_clips(flux: TangoFluxPipeline, guidance_scale: float) -> None:
    with Engine(flux, EngineConfig(threads=1)) as engine:
        request = engine.request(
            PROMPT, negative_prompt="rain", duration=0.5, seed=3, guidance_scale=guidance_scale
        )
        (clip,) = engine.generate(request).clips
    expected = flux(
        PROMPT,
        audio_length_in_s=0.5,
        guidance_scale=guidance_scale,
        negative_prompt="rain",
        generator=clip_generator(3),
    )
    assert expected.audios.shape == (1, 8_000) and expected.sampling_rate == 16_000
    np.testing.assert_array_equal(expected.audios[0], clip.waveform())


def test_the_call_as_diffusers_pipelines_have_it(flux: TangoFluxPipeline, saved: Path) -> None:
    def run(pipeline: Any, **options: Any) -> Any:
        return pipeline(PROMPT, generator=[clip_generator(3), clip_generator(4)], **options).audios

    clips = run(flux, num_waveforms_per_prompt=2)
    (batch,) = flux(
        prompt_embeds=flux.encode([PROMPT])["embeds"],
        attention_mask=flux.encode([PROMPT])["mask"],
        num_waveforms_per_prompt=2,
        latents=flux.prepare_latents(2, 0.64, [clip_generator(3), clip_generator(4)]),
        return_dict=False,
    )
    np.testing.assert_array_equal(batch, clips)
    with quiet_loading():
        loaded = DiffusionPipeline.from_pretrained(saved)
    assert isinstance(loaded, TangoFluxPipeline)
    np.testing.assert_array_equal(run(loaded, num_waveforms_per_prompt=2), clips)
    loaded.enable_model_cpu_offload(device="cpu")
    np.testing.assert_array_equal(run(loaded, num_waveforms_per_prompt=2), clips)
    other = FlowMatchHeunDiscreteScheduler.from_config(flux.scheduler.config)
    with quiet_loading():
        heun = TangoFluxPipeline.from_pretrained(saved, scheduler=other)
    assert np.abs(run(heun, num_waveforms_per_prompt=2) - clips).max() > 1e-4
    with pytest.raises(InvalidInputError, match=r"audio_length_in_s: 3\.0 s; give more than 0"):
        flux(PROMPT, 3.0)
    heun.scheduler = DDPMScheduler()
    with pytest.raises(InvalidInputError, match="prediction_type is 'epsilon'"):
        heun(PROMPT)


def _velocity(flux: TangoFluxPipeline, prompt: str = PROMPT, seconds: Tensor = SECONDS) -> Tensor:
    latents = flux.noise(0.64, clip_generator(0))
    return flux.predict(latents, torch.tensor([500.0]), flux.encode([prompt]), seconds)


def test_the_denoiser_is_fluxs_transformer_as_upstream_calls_it(flux: TangoFluxPipeline) -> None:
    """Without padding no position is masked, and the call is that of TangoFlux's `inference_flow`."""
    denoiser, text = flux.transformer, flux.encode([PROMPT], length=4)
    assert text["mask"].all()
    latents_BTC, timestep = flux.noise(0.64, clip_generator(0)), torch.tensor([500.0])
    with torch.no_grad():
        duration_B1D = denoiser.duration_embedder(SECONDS)
        expected = denoiser.transformer(
            hidden_states=latents_BTC,
            timestep=timestep / 1000,
            guidance=None,
            pooled_projections=denoiser.fc(text["embeds"].mean(1)),
            encoder_hidden_states=torch.cat([text["embeds"], duration_B1D], dim=1),
            txt_ids=torch.zeros(5, 3),
            img_ids=torch.arange(40)[:, None].repeat(1, 3),
            return_dict=False,
        )[0]
    found = flux.predict(latents_BTC, timestep, text, SECONDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_prompt_duration_and_timestep_change_the_prediction(flux: TangoFluxPipeline) -> None:
    plain = _velocity(flux)
    for other in (_velocity(flux, "rain falls"), _velocity(flux, seconds=torch.tensor([2.0]))):
        assert float((plain - other).abs().max()) > 1e-4


def test_masked_positions_change_nothing(flux: TangoFluxPipeline) -> None:
    latents, timesteps = flux.noise(0.64, clip_generator(0)), torch.tensor([500.0])
    short, long = (flux.encode([PROMPT], length=length) for length in (4, 16))
    garbage_BLD = long["embeds"].masked_fill(~long["mask"][..., None], 99.0)
    padded = Conditioning(tensors={"embeds": garbage_BLD, "mask": long["mask"]})
    ours, theirs = (flux.predict(latents, timesteps, text, SECONDS) for text in (short, padded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_rows_are_independent_and_have_their_own_timesteps(flux: TangoFluxPipeline) -> None:
    latents_BTC = torch.cat([flux.noise(0.64, clip_generator(seed)) for seed in (0, 1)])
    timesteps_B, seconds_B = torch.tensor([900.0, 133.7]), torch.tensor([0.64, 2.56])
    prompts = [PROMPT, "rain falls"]
    both = flux.predict(latents_BTC, timesteps_B, flux.encode(prompts), seconds_B)
    for row in range(2):
        one = slice(row, row + 1)
        text = flux.encode(prompts[one])
        alone = flux.predict(latents_BTC[one], timesteps_B[one], text, seconds_B[one])
        torch.testing.assert_close(both[one], alone, rtol=0, atol=1e-5)


def test_steps_are_even_from_noise_to_one_before_the_clip(flux: TangoFluxPipeline) -> None:
    assert flux.solver("euler", 4).timesteps == pytest.approx([1000.0, 750.0, 500.0, 250.0])
    assert flux.solver("euler", 1).timesteps == [1000.0]
    with pytest.raises(InvalidInputError, match=r"scheduler: unknown scheduler 'ddpm'; use one of euler"):
        flux.solver("ddpm", 4)


def test_along_the_true_velocity_every_estimate_and_the_end_are_the_clip(flux: TangoFluxPipeline) -> None:
    clean, noise = torch.randn(1, 40, 4), torch.randn(1, 40, 4)
    solver, latents = flux.solver("euler", 5), noise
    for index in range(5):
        torch.testing.assert_close(solver.clean_estimate(noise - clean, index, latents), clean)
        latents = solver.step(noise - clean, index, latents, clip_generator(0))
    torch.testing.assert_close(latents, clean, rtol=1e-5, atol=1e-5)


def test_sizes(flux: TangoFluxPipeline) -> None:
    described = flux.description
    assert (described.geometry.sampling_rate, described.geometry.hop_length) == (16_000, 1024)
    assert (described.geometry.latent_channels, described.geometry.duration_grid) == (4, 2.56)
    assert (described.limits.min_duration, described.limits.max_duration) == (0.064, 2.56)
    assert (described.limits.schedulers, described.defaults.scheduler) == (("euler",), "euler")
    assert {flux.latent_frames(seconds) for seconds in (0.064, 0.64, 2.56)} == {40}
    assert flux.noise(0.64, clip_generator(0)).shape == (1, 40, 4)


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_is_encoded_and_decoded(channels: int) -> None:
    flux = tiny_tangoflux(channels=channels)
    waveform_BN = torch.randn(2, flux.latent_samples(0.64), generator=clip_generator(0)) / 10
    assert waveform_BN.shape == (2, 10_240)
    latents_BTC = flux.encode_audio(waveform_BN)
    assert latents_BTC.shape == (2, 40, 4)
    with torch.no_grad():
        padded = torch.nn.functional.pad(waveform_BN, (0, 40_960 - 10_240))
        posterior = flux.vae.encode(torch.stack([padded] * channels, dim=1)).latent_dist
        expected = flux.vae.decode(posterior.mean).sample.mean(1)
    torch.testing.assert_close(latents_BTC, posterior.mean.transpose(1, 2))
    decoded_BN = flux.decode(latents_BTC, 10_240)
    assert decoded_BN.shape == (2, 10_240) and decoded_BN.abs().max() <= 1
    torch.testing.assert_close(decoded_BN, expected[:, :10_240])


def test_a_preview_is_the_spectrogram_of_the_decoded_clip(flux: TangoFluxPipeline) -> None:
    latents = flux.noise(0.64, clip_generator(0))
    mel_BTM = flux.preview(latents, 10_000)
    assert mel_BTM.shape == (1, 10, 64)
    # Windows of two latent frames, one around the start of each.
    padded_N = torch.nn.functional.pad(flux.decode(latents), (1024, 1024), mode="reflect")[0]
    windows = padded_N.unfold(0, 2048, 1024)[:10] * torch.hann_window(2048)
    bands = torch.fft.rfft(windows).abs() @ mel_filterbank(n_fft=2048, mel_bins=64)
    torch.testing.assert_close(mel_BTM[0], bands.clamp(min=1e-5).log(), rtol=1e-3, atol=1e-3)


def test_folder_round_trip(flux: TangoFluxPipeline, saved: Path) -> None:
    check_generator(saved)
    loaded = load_generator(saved)
    assert isinstance(loaded, TangoFluxPipeline) and loaded.description == flux.description
    # To the bit only with itself: in a file weights are aligned otherwise, and kernels depend on it.
    torch.testing.assert_close(_velocity(loaded), _velocity(flux), rtol=0, atol=1e-5)
    again = load_generator(saved)
    assert isinstance(again, TangoFluxPipeline) and torch.equal(_velocity(loaded), _velocity(again))
    half = load_generator(saved, dtype="bfloat16")
    assert isinstance(half, TangoFluxPipeline)
    assert (half.transformer.dtype, half.vae.dtype) == (torch.bfloat16, torch.float32)
    assert torch.isfinite(_velocity(half)).all()
    family = architecture_of(saved)
    assert (family.objective, family.default_duration(saved)) == ("flow", 0.64)
    encoders = family.load_encoders(saved, torch.device("cpu"))
    assert isinstance(encoders, TangoFluxPipeline) and encoders.transformer is None
    with pytest.raises(ModelFormatError, match="holds a TangoFluxPipeline, not a TangoPipeline"):
        load_tango(saved)


def _edit(file: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**data, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit("model_index.json", transformer=["os", "system"]), "transformer is a os.system"),
        (_edit("model_index.json", scheduler=["diffusers", "DDPMScheduler"]), "is a diffusers.DDPMSched"),
        (_edit("model_index.json", latent_length=10), "do not ascend to at most 0.64 s"),
        (_edit("transformer/config.json", joint_attention_dim=24), "wrong shapes"),
        (_edit("vae/config.json", decoder_channels=16), "wrong shapes"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "no weights"),
    ],
)
def test_damaged_folder_is_refused(
    saved: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ModelFormatError) as caught:
        load_generator(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_parts_that_do_not_fit_are_refused(flux: TangoFluxPipeline) -> None:
    wide = type(flux.transformer).from_config({**flux.transformer.config, "in_channels": 5})
    sizes: dict[str, Any] = {"latent_length": 40, "default_duration": 0.64, "max_duration": 2.56}
    with pytest.raises(ModelFormatError, match=r"in_channels is 5 but vae.decoder_input_channels is 4"):
        TangoFluxPipeline(**{**flux.components, "transformer": wide}, **sizes)
    with pytest.raises(ModelFormatError, match=r"default_duration 10.0 s and max_duration 2.56 s do"):
        TangoFluxPipeline(**flux.components, latent_length=40, max_duration=2.56)


def test_parts_neither_train_nor_drop_out(flux: TangoFluxPipeline) -> None:
    for part in (flux.text_encoder, flux.transformer, flux.vae):
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())
