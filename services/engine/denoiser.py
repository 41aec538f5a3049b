"""One denoiser call over the slots of a group, in buffers of fixed shape.

Shapes: R rows of the call (see `batching`), L text tokens, X the model's own shape of latents.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from services.engine.batching import GUIDED_ROWS, choose_rows
from services.engine.jobs import GroupKey, Slot
from services.models.latent import Conditioning, LatentPipeline, guide

# Buffers are small (a few MB each at released size), but callers choose the durations: keep the recent ones.
_MAX_BUFFERS = 16


class _Buffers:
    """The inputs of calls of one shape, filled in place: the device sees the same addresses each time."""

    def __init__(self, slot: Slot, length: int, rows: int) -> None:
        prompt = slot.job.prompt
        assert prompt is not None
        device = slot.latents_1X.device
        self.latents_RX = torch.zeros((rows, *slot.latents_1X.shape[1:]), device=device)
        # Exact for whole timesteps too: float32 holds them up to 2^24.
        self.timesteps_R = torch.zeros(rows, device=device)
        self.seconds_R = torch.zeros(rows, device=device)
        # Padding rows attend to everything: a row without a single visible token could come out as NaN.
        self.conditioning = Conditioning(
            tensors={
                name: tensor.new_full((rows, length, *tensor.shape[2:]), tensor.dtype == torch.bool)
                for name, tensor in prompt.conditioning.tensors.items()
            }
        )
        self._occupants: list[Slot] = []
        self._views: list[Tensor] = []

    def fill(self, slots: Sequence[Slot]) -> None:
        """Lay out `slots` one after another. The content of the rows after them does not matter."""
        if slots != self._occupants:
            self._seat(slots)
        timesteps: list[float] = []
        for slot, view in zip(slots, self._views, strict=True):
            view.copy_(slot.latents_1X)
            timesteps += [slot.timestep] * slot.rows
        self._copy(timesteps, self.timesteps_R)

    def forget(self) -> None:
        """Drop the slots of the last call."""
        self._occupants, self._views = [], []

    def _seat(self, slots: Sequence[Slot]) -> None:
        self._views = []
        seconds: list[float] = []
        row = 0
        for slot in slots:
            self._views.append(self.latents_RX[row : row + slot.rows])
            seconds += [slot.job.request.duration] * slot.rows
            prompt, negative_prompt = slot.job.prompt, slot.job.negative_prompt
            prompts = (negative_prompt, prompt) if slot.rows == GUIDED_ROWS else (prompt,)
            for offset, encoded in enumerate(prompts):
                assert encoded is not None
                self._write_text(row + offset, encoded.conditioning)
            row += slot.rows
        self._copy(seconds, self.seconds_R)
        self._occupants = list(slots)

    def _write_text(self, row: int, text: Conditioning) -> None:
        # The other of prompt and negative prompt may be longer: the rest is masked.
        for name, buffer in self.conditioning.tensors.items():
            buffer[row, : text.length] = text[name][0]
            buffer[row, text.length :] = 0

    def _copy(self, values: Sequence[float], buffer_R: Tensor) -> None:
        # From pinned memory the copy does not wait for the device's last call.
        host_R = torch.tensor(values, dtype=torch.float32, pin_memory=buffer_R.is_cuda)
        buffer_R[: len(values)].copy_(host_R, non_blocking=True)


class Denoiser:
    """Calls the pipeline's denoiser for several clips at once and applies each clip's guidance."""

    def __init__(self, pipeline: LatentPipeline, shapes: Sequence[int], *, exact: bool) -> None:
        self._pipeline = pipeline
        # Read once: the library's property walks through all parts of the pipeline.
        self._paced = pipeline.device.type == "cuda"
        self._shapes = shapes
        self._exact = exact
        self._buffers: OrderedDict[tuple[GroupKey, int], _Buffers] = OrderedDict()
        self._pending: torch.cuda.Event | None = None

    def __call__(self, key: GroupKey, slots: Sequence[Slot]) -> tuple[list[Tensor], int]:
        """Return each slot's guided output, [1, X] in float32, and the rows of the call."""
        rows = choose_rows(sum(slot.rows for slot in slots), self._shapes, exact=self._exact)
        buffers = self._buffers_for(key, slots[0], rows)
        buffers.fill(slots)
        output_RX = self._pipeline.predict(
            buffers.latents_RX, buffers.timesteps_R, buffers.conditioning, buffers.seconds_R
        )
        self._pace()
        return _guided(output_RX, slots), rows

    def forget(self) -> None:
        """Drop the last calls' slots, so that an idle engine holds no caller's prompt or latents."""
        for buffers in self._buffers.values():
            buffers.forget()

    def _buffers_for(self, key: GroupKey, slot: Slot, rows: int) -> _Buffers:
        buffers = self._buffers.get((key, rows))
        if buffers is None:
            buffers = _Buffers(slot, key.text_length, rows)
            self._buffers[key, rows] = buffers
            if len(self._buffers) > _MAX_BUFFERS:
                self._buffers.popitem(last=False)
        self._buffers.move_to_end((key, rows))
        return buffers

    def _pace(self) -> None:
        """Keep the host at most one call ahead of a GPU: enough to keep it busy, and progress stays true."""
        if not self._paced:
            return
        previous, self._pending = self._pending, torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending.record()
        if previous is not None:
            previous.synchronize()


def _guided(output_RX: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
    """Return each guided slot's two rows as one, and the single row of others as it is."""
    guided: list[Tensor] = []
    row = 0
    for slot in slots:
        output_1X = output_RX[row : row + 1]
        if slot.rows == GUIDED_ROWS:
            conditional_1X = output_RX[row + 1 : row + 2]
            output_1X = guide(output_1X, conditional_1X, slot.job.request.guidance_scale)
        guided.append(output_1X)
        row += slot.rows
    return guided
