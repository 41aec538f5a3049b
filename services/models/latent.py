"""What the engine and the training need of a text-to-audio model that denoises latents.

Shapes: B rows (prompts or clips), L text tokens, X a family's own shape of latents, N samples, T mel frames,
M mel bins.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Generator, Tensor

from services.api.generation import GenerationModel


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Conditioning:
    """Prompts as a denoiser reads them: named tensors [B, L, ...], a row a prompt, then its tokens."""

    tensors: Mapping[str, Tensor]
    """One of them is ``mask``, bool [B, L]: true where there is a token, false where there is padding."""

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor `name`."""
        return self.tensors[name]

    @property
    def length(self) -> int:
        """Tokens of a row, padding included."""
        return self["mask"].shape[1]

    def repeat_interleave(self, count: int) -> "Conditioning":
        """Return every row `count` times, the copies of a row side by side."""
        return Conditioning(tensors={k: v.repeat_interleave(count, 0) for k, v in self.tensors.items()})

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
        """Return the rows of `parts`, which must have one length, one after another."""
        return cls(tensors={k: torch.cat([part[k] for part in parts]) for k in parts[0].tensors})

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """Return the same on `device`, floats as `dtype`."""
        return Conditioning(
            tensors={
                name: tensor.to(device, dtype if tensor.is_floating_point() else None)
                for name, tensor in self.tensors.items()
            }
        )


class Solver(ABC):
    """Takes one clip from noise to clean latents, by one of diffusers' schedulers.

    A scheduler keeps a history of its steps, so each clip needs a solver of its own.
    """

    def __init__(self, scheduler: Any) -> None:
        """Take over `scheduler`, whose timesteps are set."""
        if hasattr(scheduler, "set_begin_index"):
            # Otherwise the first step looks its timestep up, and finds the second where two are equal.
            scheduler.set_begin_index(0)
        self._scheduler = scheduler
        self._takes_generator = takes_generator(scheduler)
        # As numbers, on the host: reading one from the device would wait for it at every step.
        self.timesteps: list[float] = scheduler.timesteps.tolist()
        """Of each step, as the denoiser takes them."""

    def step(self, output: Tensor, index: int, latents: Tensor, generator: Generator) -> Tensor:
        """Return the latents after step `index`, the next one, for the denoiser's (guided) `output`.

        `generator` is for schedulers that draw noise.
        """
        noise = {"generator": generator} if self._takes_generator else {}
        stepped = self._scheduler.step(output, self.timesteps[index], latents, return_dict=False, **noise)
        return cast(Tensor, stepped[0])

    @abstractmethod
    def clean_estimate(self, output: Tensor, index: int, latents: Tensor) -> Tensor:
        """Return the denoiser's estimate of the clean latents, before step `index` is taken."""


class LatentPipeline(Protocol):
    """A family of generators, as the engine and the training use it. All latents have rows first: [B, X].

    `services.models.architectures` lists the families.
    """

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def description(self) -> GenerationModel:
        """Sizes, limits and defaults. The model's version is the caller's to fill in."""

    def latent_frames(self, duration: float) -> int:
        """Return the length of the latents of a clip of `duration` seconds. Equal lengths share a batch."""

    def latent_samples(self, duration: float) -> int:
        """Return the samples of a waveform that `encode_audio` takes for a clip of `duration` seconds."""

    def text_length(self, prompt: str) -> int:
        """Return the tokens that `prompt` is padded to: one of few numbers, so that batches match."""

    def encode(self, prompts: Sequence[str], *, length: int) -> Conditioning:
        """Return what the denoiser reads of `prompts`, cut or padded to `length` tokens."""

    def prompt_warnings(self, prompt: str) -> tuple[str, ...]:
        """Return what the model does not read of `prompt`, one sentence each."""

    def noise(self, duration: float, generator: Generator) -> Tensor:
        """Draw the unit noise [1, X] that a clip of `duration` seconds begins with, float32, on `device`."""

    def solver(self, name: str, steps: int) -> Solver:
        """Return a new solver by the name of a scheduler. Raises `InvalidInputError` for an unknown one."""

    def predict(
        self, latents_BX: Tensor, timesteps_B: Tensor, conditioning: Conditioning, seconds_B: Tensor
    ) -> Tensor:
        """Call the denoiser once, without gradients; [B, X] in float32.

        Rows are independent. `timesteps_B` are those of solvers, `seconds_B` the durations of the clips.
        """

    def decode(self, latents_BX: Tensor, samples: int) -> Tensor:
        """Return waveforms [B, N] in [-1, 1], float32, of clean latents, cut to `samples`."""

    def preview(self, latents_BX: Tensor, samples: int) -> Tensor:
        """Return log-mel spectrograms [B, T, M] in natural logarithms of clean latents, cut to `samples`."""

    def encode_audio(self, waveform_BN: Tensor) -> Tensor:
        """Return the latents [B, X] of waveforms at the model's rate, `latent_samples` long."""


def takes_generator(scheduler: Any) -> bool:
    """Return whether a step of one of diffusers' schedulers can draw noise from a generator."""
    return "generator" in inspect.signature(scheduler.step).parameters


def clip_generator(seed: int, clip_index: int = 0) -> Generator:
    """Return the CPU generator of all of a clip's noise, whatever the batch, the process or the device.

    Seed (0 or more, any size) and index are hashed together by numpy's SeedSequence, so that neighbouring
    seeds and indices share no noise.
    """
    state = np.random.SeedSequence([seed, clip_index]).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))


def guide(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Apply classifier-free guidance (arXiv 2207.12598) to the denoiser's outputs."""
    return unconditional + guidance_scale * (conditional - unconditional)


def within_full_scale(waveform_BN: Tensor) -> Tensor:
    """Divide each row of [B, N] by its peak where that is above 1; the others keep every bit."""
    return waveform_BN / waveform_BN.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
