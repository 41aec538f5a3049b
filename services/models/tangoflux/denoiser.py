"""TangoFlux's denoiser: diffusers' Flux transformer, with the duration as an additional text token.

Shapes: B batch, T latent frames, C latent channels, L text tokens, D text width.
"""

from typing import cast

import torch
from diffusers import ConfigMixin, FluxTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioNumberConditioner
from torch import Tensor, nn

from services.models.latent import Conditioning

_TIMESTEPS = 1000
"""Timesteps of the schedule; the transformer takes timesteps divided by it."""


class TangoFluxDenoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Predicts a rectified flow's velocity, noise minus clip: upstream's `TangoFlux` without the text
    encoder.

    The duration is an additional token after the text. The projected mean of the text tokens modulates every
    layer. Unlike upstream, attention masks the text's padding, so that the padded length does not change a
    clip.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 6,
        num_single_layers: int = 18,
        attention_head_dim: int = 128,
        num_attention_heads: int = 8,
        joint_attention_dim: int = 1024,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        max_duration: float = 30.0,
    ) -> None:
        """Sizes as in `FluxTransformer2DModel`; `joint_attention_dim` is D, `max_duration` is in seconds."""
        super().__init__()
        self.transformer = FluxTransformer2DModel(
            in_channels=in_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=joint_attention_dim,
            axes_dims_rope=tuple(axes_dims_rope),
        )
        self.fc = nn.Sequential(nn.Linear(joint_attention_dim, joint_attention_dim), nn.ReLU())
        self.duration_embedder = StableAudioNumberConditioner(joint_attention_dim, 0, max_duration)

    def forward(
        self,
        latents_BTC: Tensor,
        timesteps_B: Tensor,
        embeds_BLD: Tensor,
        mask_BL: Tensor,
        seconds_B: Tensor,
    ) -> Tensor:
        """Return the velocity [B, T, C] of latents at timesteps in [0, 1000], for clips of `seconds_B`."""
        frames, device = latents_BTC.shape[1], latents_BTC.device
        weights_BL1 = mask_BL[..., None].to(embeds_BLD.dtype)
        mean_BD = (embeds_BLD * weights_BL1).sum(1) / weights_BL1.sum(1)
        text_BKD = torch.cat([embeds_BLD, self.duration_embedder(seconds_B)], dim=1)
        others_BK = mask_BL.new_ones((len(mask_BL), 1 + frames))
        velocity_BTC = self.transformer(
            hidden_states=latents_BTC,
            timestep=timesteps_B / _TIMESTEPS,
            pooled_projections=self.fc(mean_BD),
            encoder_hidden_states=text_BKD,
            txt_ids=torch.zeros((text_BKD.shape[1], 3), device=device),
            img_ids=torch.arange(frames, device=device)[:, None].expand(frames, 3),
            joint_attention_kwargs={"attention_mask": torch.cat([mask_BL, others_BK], dim=1)[:, None, None]},
            return_dict=False,
        )[0]
        return cast(Tensor, velocity_BTC)


def flow_velocity(
    denoiser: nn.Module,
    latents_BTC: Tensor,
    timesteps_B: Tensor,
    conditioning: Conditioning,
    seconds_B: Tensor,
    jumps_B2: Tensor | None = None,
) -> Tensor:
    """Call a `TangoFluxDenoiser`; return the velocity [B, T, C]."""
    velocity_BTC = denoiser(latents_BTC, timesteps_B, conditioning["embeds"], conditioning["mask"], seconds_B)
    return cast(Tensor, velocity_BTC)
