"""Every number that upstream's own code produced, stage by stage, from a converted checkpoint.

Tolerances are the references' own: float32 in another version of the libraries. Wrong choices (no text mask,
another spacing, clipping, another prediction type) are further off by orders of magnitude.

Shape legend: B batch, C channels, T latent frames, F latent mel bins, L text tokens, D text width, N samples.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from services.models.latent import Conditioning
from services.models.mel import LogMel
from services.models.tango.pipeline import TangoPipeline
from tests.services.models.tango.released import references

PROMPTS = ["A dog barks and rain", "rolling thunder with lightning strikes, people talking quiet"]


@pytest.fixture(scope="module")
def ref() -> dict[str, Any]:
    return references()


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= tolerance


def near_int16(waveform: Tensor | NDArray[np.float32], wanted: NDArray[np.int16], steps: int) -> None:
    """Upstream's conversion truncates, and wraps at full scale: repeated here, and nowhere else."""
    found = (np.asarray(waveform) * 32768).astype(np.int32).astype(np.int16)
    assert found.shape == wanted.shape
    assert int(np.abs(found.astype(np.int32) - wanted.astype(np.int32)).max()) <= steps


def embeddings(pipeline: TangoPipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    conditional = pipeline.encode(prompts)
    unconditional = pipeline.encode([""] * len(prompts), length=conditional.length)
    return conditional, unconditional


def test_vae_encoder(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    with torch.no_grad():
        posterior = converted.vae.encode(ref["in_mel_in"]).latent_dist
    near(posterior.mean, ref["ref_vae_mean"], 1e-4)
    near(posterior.logvar, ref["ref_vae_logvar"], 1e-4)


def test_vae_decoder(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    near(converted.decode_mel(ref["in_z_in"]), ref["ref_vae_mel"].squeeze(1), 1e-4)


def test_vocoder(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    with torch.no_grad():
        waveform_BN = converted.vocoder(ref["ref_vae_mel"].squeeze(1))
    near(waveform_BN, ref["ref_voc_wave"], 1e-4)
    near_int16(waveform_BN, ref["ref_voc_int16"], 2)


def test_log_mel(ref: dict[str, Any]) -> None:
    near(LogMel()(ref["in_wave_in"]).transpose(1, 2), ref["ref_stft_mel"], 1e-4)


def test_text(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    found = converted.encode(PROMPTS)
    near(found["embeds"], ref["ref_txt_embeds"], 1e-4)
    assert torch.equal(found["mask"], ref["ref_txt_mask"])


def test_text_for_guidance(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    conditional, unconditional = embeddings(converted, PROMPTS)
    near(Conditioning.cat([unconditional, conditional])["embeds"], ref["ref_cfg_embeds"], 1e-4)
    assert torch.equal(Conditioning.cat([unconditional, conditional])["mask"], ref["ref_cfg_mask"])


@pytest.mark.parametrize("timestep", [801, 1])
def test_denoiser(converted: TangoPipeline, ref: dict[str, Any], timestep: int) -> None:
    timesteps_B = torch.tensor([timestep, timestep])
    text = Conditioning(tensors={"embeds": ref["in_unet_e"], "mask": ref["in_unet_m"]})
    found = converted.predict(ref["in_unet_x"], timesteps_B, text)
    near(found, ref[f"ref_unet_t{timestep}"], 1e-4)


def test_denoiser_without_mask_is_another(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    with torch.no_grad():
        found = converted.unet(ref["in_unet_x"], 801, ref["in_unet_e"]).sample
    near(found, ref["ref_unet_t801_nomask"], 1e-4)
    assert float((found - ref["ref_unet_t801"]).abs().max()) > 0.01


@pytest.fixture
def given_noise(monkeypatch: pytest.MonkeyPatch, ref: dict[str, Any]) -> None:
    """Let diffusers' ancestral scheduler draw the noise that upstream drew."""
    noise: Iterator[Tensor] = iter(ref["in_gen_noise"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noise))


@pytest.mark.usefixtures("given_noise")
def test_generation(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    steps: list[tuple[int, int, Tensor]] = []
    conditional, unconditional = embeddings(converted, PROMPTS[:1])
    latents_BCTF = converted.denoise(
        ref["in_gen_latents"],
        conditional,
        unconditional,
        guidance_scale=3.0,
        num_inference_steps=5,
        scheduler="ddpm",
        on_step_end=lambda _, step, timestep, own: steps.append((step, int(timestep), own["latents"])),
    )
    assert [step for step, _, _ in steps] == list(range(5))
    timesteps = [timestep for _, timestep, _ in steps]
    assert timesteps == ref["ref_gen_timesteps"].tolist() == [801, 601, 401, 201, 1]
    near(torch.stack([latents for _, _, latents in steps]), ref["ref_gen_steps"], 2e-4)
    near(latents_BCTF, ref["ref_gen_latents_out"], 2e-4)
    near(converted.decode_mel(latents_BCTF), ref["ref_gen_mel"].squeeze(1), 2e-4)
    near_int16(converted.decode(latents_BCTF), ref["ref_gen_int16"], 4)


@pytest.mark.usefixtures("given_noise")
def test_generation_without_guidance(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    conditional, _ = embeddings(converted, PROMPTS[:1])
    found = converted.denoise(
        ref["in_gen_latents"], conditional, guidance_scale=1.0, num_inference_steps=5, scheduler="ddpm"
    )
    near(found, ref["ref_gen_g1_latents"], 2e-4)


def test_torch_draws_what_upstream_drew(ref: dict[str, Any]) -> None:
    noise = torch.randn((1, 8, 256, 16), generator=Generator().manual_seed(1234))
    assert torch.equal(noise.flatten()[:8], ref["ref_rng_first8_seed1234"])


def test_whole_call(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    """`torch.manual_seed(1234); Tango.generate(prompt, steps=3)`: one generator draws all noise in turn."""
    found = converted(
        PROMPTS[0], num_inference_steps=3, guidance_scale=3.0, generator=Generator().manual_seed(1234)
    ).audios
    # Upstream leaves HiFi-GAN's 32 samples beyond 10.24 s; here the clip has the length that was asked for.
    wanted = ref["ref_api_generate_seed1234_steps3"]
    assert found.shape == (1, 163_840) and wanted.shape == (163_872,)
    near_int16(found[0], wanted[:163_840], 4)


def test_whole_batch(converted: TangoPipeline, ref: dict[str, Any]) -> None:
    """`torch.manual_seed(1234); Tango.generate_for_batch(prompts, steps=2, guidance=2.5, samples=2)`."""
    found = converted(
        PROMPTS,
        num_inference_steps=2,
        guidance_scale=2.5,
        num_waveforms_per_prompt=2,
        generator=Generator().manual_seed(1234),
    ).audios
    near_int16(found.reshape(2, 2, -1)[..., :24_000], ref["ref_api_batch_seed1234_steps2"], 4)
