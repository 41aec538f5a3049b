"""One denoiser call over the clips of a group, in buffers of fixed shape.

Shapes: R rows of the call (see `batching`), L text tokens, X the model's own shape of latents.
"""

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from services.engine.batching import GUIDED_ROWS, choose_rows
from services.engine.states import ClipState, GroupKey
from services.models.latent import Conditioning, LatentPipeline, guide
from services.models.lora import RowAdapters

# Buffers are small (a few MB each for released models), but callers choose the durations: keep recent ones.
_MAX_BUFFERS = 16


class _Buffers:
    """Inputs of denoiser calls of one shape, filled in place: their device addresses are fixed."""

    def __init__(self, clip: ClipState, length: int, rows: int, *, folds_guidance: bool) -> None:
        self.folds_guidance = folds_guidance
        prompt = clip.state.prompt
        assert prompt is not None
        device = clip.latents_1X.device
        self.latents_RX = torch.zeros((rows, *clip.latents_1X.shape[1:]), device=device)
        # Exact for integer timesteps too: float32 represents them up to 2^24.
        self.timesteps_R = torch.zeros(rows, device=device)
        self.seconds_R = torch.zeros(rows, device=device)
        self.jumps_R2 = torch.zeros((rows, 2), device=device)
        # Padding rows attend to everything: a row without a single visible token could come out as NaN.
        self.conditioning = Conditioning(
            tensors={
                name: tensor.new_full((rows, length, *tensor.shape[2:]), tensor.dtype == torch.bool)
                for name, tensor in prompt.conditioning.tensors.items()
            }
        )
        self._occupants: list[tuple[ClipState, int]] = []
        """The clips of the last call, with their rows."""
        self._views: list[Tensor] = []
        self._adapters: RowAdapters | None = None

    def fill(self, clips: Sequence[ClipState], denoiser: nn.Module | None) -> None:
        """Write the inputs of `clips` to consecutive rows. Padding rows keep any content."""
        occupants = [(clip, clip.rows) for clip in clips]
        if occupants != self._occupants:
            self._lay_out(clips)
            self._adapt(clips, denoiser)
            self._occupants = occupants
        timesteps: list[float] = []
        for clip, view in zip(clips, self._views, strict=True):
            view.copy_(clip.latents_1X)
            timesteps += [clip.timestep] * clip.rows
        self._copy(timesteps, self.timesteps_R)
        if self.folds_guidance:
            self._copy([clip.jump for clip in clips], self.jumps_R2)

    def adapted(self) -> AbstractContextManager[None]:
        """Return a context in which the denoiser applies the clips' adapters, each to its own rows."""
        return nullcontext() if self._adapters is None else self._adapters.applied()

    def forget(self) -> None:
        """Drop the clips of the last call."""
        self._occupants, self._views, self._adapters = [], [], None

    def _lay_out(self, clips: Sequence[ClipState]) -> None:
        self._views = []
        seconds: list[float] = []
        row = 0
        for clip in clips:
            self._views.append(self.latents_RX[row : row + clip.rows])
            seconds += [clip.state.request.duration] * clip.rows
            prompt, negative_prompt = clip.state.prompt, clip.state.negative_prompt
            prompts = (negative_prompt, prompt) if clip.rows == GUIDED_ROWS else (prompt,)
            for offset, encoded in enumerate(prompts):
                assert encoded is not None
                self._write_text(row + offset, encoded.conditioning)
            row += clip.rows
        self._copy(seconds, self.seconds_R)

    def _adapt(self, clips: Sequence[ClipState], denoiser: nn.Module | None) -> None:
        adapters = [clip.state.adapter for clip in clips for _ in range(clip.rows)]
        self._adapters = None
        if denoiser is not None and any(adapter is not None for adapter in adapters):
            padding = len(self.latents_RX) - len(adapters)
            self._adapters = RowAdapters(denoiser, [*adapters, *[None] * padding])

    def _write_text(self, row: int, text: Conditioning) -> None:
        # Prompt and negative prompt may differ in length: the rest is masked.
        for name, buffer in self.conditioning.tensors.items():
            buffer[row, : text.length] = text[name][0]
            buffer[row, text.length :] = 0

    def _copy(self, values: Sequence[Any], buffer_R: Tensor) -> None:
        # From pinned memory, the copy does not wait for the device's previous call.
        host_R = torch.tensor(values, dtype=torch.float32, pin_memory=buffer_R.is_cuda)
        buffer_R[: len(values)].copy_(host_R, non_blocking=True)


class Denoiser:
    """Calls the pipeline's denoiser for several clips at once and applies each clip's guidance."""

    def __init__(self, pipeline: LatentPipeline, shapes: Sequence[int], *, exact: bool) -> None:
        self._pipeline = pipeline
        # Cached: diffusers' property iterates over all parts of the pipeline.
        self._paced = pipeline.device.type == "cuda"
        self._shapes = shapes
        self._exact = exact
        self._buffers: OrderedDict[tuple[GroupKey, int], _Buffers] = OrderedDict()
        self._pending: torch.cuda.Event | None = None

    def __call__(self, key: GroupKey, clips: Sequence[ClipState]) -> tuple[list[Tensor], int]:
        """Return each clip's guided output, [1, X] in float32, and the rows of the call."""
        rows = choose_rows(sum(clip.rows for clip in clips), self._shapes, exact=self._exact)
        buffers = self._buffers_for(key, clips[0], rows)
        buffers.fill(clips, self._pipeline.adaptable)
        with buffers.adapted():
            output_RX = self._pipeline.predict(
                buffers.latents_RX,
                buffers.timesteps_R,
                buffers.conditioning,
                buffers.seconds_R,
                buffers.jumps_R2,
            )
        self._pace()
        return _guided(output_RX, clips), rows

    def free(self) -> None:
        """Free the memory of all buffers."""
        self._buffers.clear()
        if self._paced:
            torch.cuda.empty_cache()

    def forget(self) -> None:
        """Drop the clips of the last calls, so that an idle engine holds no prompts or latents."""
        for buffers in self._buffers.values():
            buffers.forget()

    def _buffers_for(self, key: GroupKey, clip: ClipState, rows: int) -> _Buffers:
        buffers = self._buffers.get((key, rows))
        if buffers is None:
            buffers = _Buffers(clip, key.text_length, rows, folds_guidance=self._pipeline.folds_guidance)
            self._buffers[key, rows] = buffers
            if len(self._buffers) > _MAX_BUFFERS:
                self._buffers.popitem(last=False)
        self._buffers.move_to_end((key, rows))
        return buffers

    def _pace(self) -> None:
        """Keep the host at most one call ahead of a GPU: the GPU stays busy, and progress stays accurate."""
        if not self._paced:
            return
        previous, self._pending = self._pending, torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending.record()
        if previous is not None:
            previous.synchronize()


def _guided(output_RX: Tensor, clips: Sequence[ClipState]) -> list[Tensor]:
    """Return one output per clip: a guided clip's two rows combined, and the single row of others."""
    guided: list[Tensor] = []
    row = 0
    for clip in clips:
        output_1X = output_RX[row : row + 1]
        if clip.rows == GUIDED_ROWS:
            conditional_1X = output_RX[row + 1 : row + 2]
            output_1X = guide(output_1X, conditional_1X, clip.state.request.guidance_scale)
        guided.append(output_1X)
        row += clip.rows
    return guided
