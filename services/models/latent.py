"""The interface of a latent text-to-audio model that the engine and the training use.

Shapes: B rows (prompts or clips), L text tokens, X shape of the family's latents, N samples, T mel frames,
M mel bins.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

from services.api.generation import GenerationModel


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Conditioning:
    """Encoded prompts, the denoiser's text input: named tensors [B, L, ...], one row per prompt."""

    tensors: Mapping[str, Tensor]
    """Tensors by name, among them ``mask``, bool [B, L]: true for tokens, false for padding."""

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor `name`."""
        return self.tensors[name]

    @property
    def length(self) -> int:
        """Number of tokens of a row, L, padding included."""
        return self["mask"].shape[1]

    def repeat_interleave(self, count: int) -> "Conditioning":
        """Return every row `count` times, copies of a row adjacent."""
        return Conditioning(tensors={k: v.repeat_interleave(count, 0) for k, v in self.tensors.items()})

    def embedded(self, embeds: Tensor) -> "Conditioning":
        """Return a copy with other ``embeds``."""
        return Conditioning(tensors={**self.tensors, "embeds": embeds})

    def padded(self, length: int) -> "Conditioning":
        """Return the rows with masked zeros at the end, `length` tokens long."""
        missing = length - self.length
        if not missing:
            return self
        return Conditioning(
            tensors={k: pad(v, (*(0, 0) * (v.ndim - 2), 0, missing)) for k, v in self.tensors.items()}
        )

    def rows(self) -> list[dict[str, Tensor]]:
        """Return each row's tensors without padding, [tokens, ...], the mask left out."""
        return [
            {name: tensor[row][mask_L] for name, tensor in self.tensors.items() if name != "mask"}
            for row, mask_L in enumerate(self["mask"])
        ]

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Tensor]], length: int) -> "Conditioning":
        """Return the inverse of `rows`: padded with zeros to `length` tokens, floats as float32."""
        tensors = {
            name: first.new_zeros((len(rows), length, *first.shape[1:]), dtype=torch.float32)
            for name, first in rows[0].items()
        }
        tensors["mask"] = torch.zeros((len(rows), length), dtype=torch.bool)
        for number, row in enumerate(rows):
            for name, tensor in row.items():
                tensors[name][number, : len(tensor)] = tensor
                tensors["mask"][number, : len(tensor)] = True
        return cls(tensors=tensors)

    @classmethod
    def cat(cls, parts: "Sequence[Conditioning]") -> "Conditioning":
        """Concatenate the rows of `parts`, which must have the same length."""
        return cls(tensors={k: torch.cat([part[k] for part in parts]) for k in parts[0].tensors})

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """Return the tensors on `device`, floating-point ones as `dtype`."""
        return Conditioning(
            tensors={
                name: tensor.to(device, dtype if tensor.is_floating_point() else None)
                for name, tensor in self.tensors.items()
            }
        )


class Solver(ABC):
    """Denoises one clip with one of diffusers' schedulers.

    A scheduler keeps a history of its steps, so each clip needs its own solver.
    """

    def __init__(self, scheduler: Any) -> None:
        """Own `scheduler`, whose timesteps must be set."""
        if hasattr(scheduler, "set_begin_index"):
            # Otherwise the first step searches for its timestep, and finds the second of two equal ones.
            scheduler.set_begin_index(0)
        self._scheduler = scheduler
        self._takes_generator = takes_generator(scheduler)
        # Numbers on the host: reading one from the device would synchronise at every step.
        self.timesteps: list[float] = scheduler.timesteps.tolist()
        """Timestep of each step, for the denoiser."""
        self.targets: list[float] = targets_of(scheduler)
        """Timestep that each step leads to, for a distilled denoiser; 0 for others."""

    def step(self, output: Tensor, index: int, latents: Tensor, generator: Generator) -> Tensor:
        """Return the latents after step `index`, which must be the next, from the denoiser's guided `output`.

        `generator` is for schedulers that draw noise.
        """
        noise = {"generator": generator} if self._takes_generator else {}
        stepped = self._scheduler.step(output, self.timesteps[index], latents, return_dict=False, **noise)
        return cast(Tensor, stepped[0])

    @abstractmethod
    def clean_estimate(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return the estimate of the clean latents from the denoiser's `output` at step `index`."""


class LatentPipeline(Protocol):
    """A generator, as the engine and the training use it. All latents have rows first: [B, X].

    `services.models.architectures` lists the families.
    """

    @property
    def device(self) -> torch.device:
        """Device of the model."""

    @property
    def description(self) -> GenerationModel:
        """Sizes, limits and defaults. The caller fills in the model's version."""

    @property
    def folds_guidance(self) -> bool:
        """Whether the denoiser takes the guidance scale as a condition: a clip is then one row of a call."""

    @property
    def adaptable(self) -> nn.Module | None:
        """The denoiser, whose linear layers adapters change; None: the family takes no adapters."""

    def latent_frames(self, duration: float) -> int:
        """Return the length of the latents of a clip of `duration` seconds. Equal lengths share a batch."""

    def steps(self, asked: int, duration: float) -> int:
        """Return the number of steps of a clip of `duration` seconds for which `asked` were asked for."""

    def latent_samples(self, duration: float) -> int:
        """Return the number of samples that `encode_audio` needs for a clip of `duration` seconds."""

    def text_length(self, prompt: str) -> int:
        """Return the number of tokens to pad `prompt` to: one of few, so that prompts share batches."""

    def encode(self, prompts: Sequence[str], *, length: int) -> Conditioning:
        """Encode `prompts`, truncated or padded to `length` tokens."""

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        """Return what the model does not read of `prompt`: predicates, to be put after the field's name."""

    def noise(self, duration: float, generator: Generator) -> Tensor:
        """Draw the initial unit noise [1, X] of a clip of `duration` seconds, float32, on `device`."""

    def solver(self, name: str, steps: int) -> Solver:
        """Return a new solver for the scheduler `name`. Raises `InvalidInputError` for an unknown name."""

    def predict(
        self,
        latents_BX: Tensor,
        timesteps_B: Tensor,
        conditioning: Conditioning,
        seconds_B: Tensor,
        jumps_B2: Tensor | None = None,
    ) -> Tensor:
        """Call the denoiser once, without gradients; return [B, X] in float32.

        Rows are independent. `timesteps_B` come from solvers; `seconds_B` are the clips' durations.
        `jumps_B2`, guidance scales and solvers' `targets`, are needed where the model `folds_guidance`.
        """

    def decode(self, latents_BX: Tensor, samples: int) -> Tensor:
        """Decode clean latents to waveforms [B, N] in [-1, 1], float32, cut to `samples`."""

    def preview(self, latents_BX: Tensor, samples: int) -> Tensor:
        """Decode clean latents to natural-log mel spectrograms [B, T, M], cut to `samples`."""

    def encode_audio(self, waveform_BN: Tensor, *, sample: bool = False) -> Tensor:
        """Encode waveforms at the model's rate, `latent_samples` long, to latents [B, X].

        They are the means of the autoencoder's posteriors; with `sample` drawn, by torch's global generator.
        """


def takes_generator(scheduler: Any) -> bool:
    """Return whether a step of one of diffusers' schedulers can draw noise from a generator."""
    return "generator" in inspect.signature(scheduler.step).parameters


def targets_of(scheduler: Any) -> list[float]:
    """Return the timestep that each step leads to, for a distilled denoiser; 0 for others."""
    targets: list[float] = getattr(scheduler, "targets", None) or [0.0] * len(scheduler.timesteps)
    return targets


def clip_generator(seed: int, clip_index: int = 0) -> Generator:
    """Return the CPU generator of a clip's noise, independent of batch, process and device.

    numpy's SeedSequence hashes the seed (0 or more, any size) and the index, so that neighbouring seeds and
    indices share no noise.
    """
    state = np.random.SeedSequence([seed, clip_index]).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))


def guided_steps(scale: float, stop: float, steps: int, *, folded: bool = False) -> int:
    """Return how many of a clip's first steps are guided, and take two rows of a denoiser call, not one.

    A scale up to 1 means no guidance, as in diffusers. `stop` is the share of the steps after which guidance
    stops (its guiders' `stop`; arXiv 2404.07724), rounded to whole steps. `folded`: the denoiser takes the
    scale as a condition, and no unconditional row.
    """
    return round(stop * steps) if scale > 1 and not folded else 0


def guide(unconditional: Tensor, conditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Apply classifier-free guidance (arXiv 2207.12598) to the denoiser's outputs; a tensor broadcasts."""
    return unconditional + guidance_scale * (conditional - unconditional)


def within_full_scale(waveform_BN: Tensor) -> Tensor:
    """Divide each row of [B, N] by its peak if that is above 1; other rows are bitwise unchanged."""
    return waveform_BN / waveform_BN.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
