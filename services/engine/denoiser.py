"""One denoiser call over the slots of a group, in buffers of fixed shape.

Shapes: R rows of the call (see `batching`), C latent channels, T latent frames (time), F latent mel bins,
L text tokens, D text width.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from services.engine.batching import GUIDED_ROWS, choose_rows
from services.engine.jobs import GroupKey, Slot
from services.engine.prompts import EmbeddedPrompt
from services.models.tango.pipeline import TangoPipeline, guide

# Buffers are small (a few MB each at released size), but callers choose the durations: keep the recent ones.
_MAX_BUFFERS = 16


class _Buffers:
    """The inputs of calls of one shape, filled in place: the device sees the same addresses each time."""

    def __init__(self, slot: Slot, length: int, rows: int) -> None:
        prompt = slot.job.prompt
        assert prompt is not None
        device = prompt.embeds_1LD.device
        self.latents_RCTF = torch.zeros((rows, *slot.latents_1CTF.shape[1:]), device=device)
        self.timesteps_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.embeds_RLD = prompt.embeds_1LD.new_zeros((rows, length, prompt.embeds_1LD.shape[2]))
        # Padding rows attend to everything: a row without a single visible token could come out as NaN.
        self.mask_RL = torch.ones((rows, length), dtype=torch.bool, device=device)
        self._occupants: list[Slot] = []
        self._views: list[Tensor] = []

    def fill(self, slots: Sequence[Slot]) -> None:
        """Lay out `slots` one after another. What stands in the rows after them is of no consequence."""
        if slots != self._occupants:
            self._seat(slots)
        timesteps: list[int] = []
        for slot, view in zip(slots, self._views, strict=True):
            view.copy_(slot.latents_1CTF)
            timesteps += [slot.timesteps[slot.step]] * slot.rows
        # From pinned memory the copy does not wait for the device's last call.
        host_R = torch.tensor(timesteps, pin_memory=self.timesteps_R.is_cuda)
        self.timesteps_R[: len(timesteps)].copy_(host_R, non_blocking=True)

    def forget(self) -> None:
        """Let go of the slots of the last call."""
        self._occupants, self._views = [], []

    def _seat(self, slots: Sequence[Slot]) -> None:
        self._views = []
        row = 0
        for slot in slots:
            self._views.append(self.latents_RCTF[row : row + slot.rows])
            prompt, negative_prompt = slot.job.prompt, slot.job.negative_prompt
            prompts = (negative_prompt, prompt) if slot.rows == GUIDED_ROWS else (prompt,)
            for offset, embedded in enumerate(prompts):
                assert embedded is not None
                self._write_text(row + offset, embedded)
            row += slot.rows
        self._occupants = list(slots)

    def _write_text(self, row: int, embedded: EmbeddedPrompt) -> None:
        # The other of prompt and negative prompt may be longer: the rest is masked.
        tokens = embedded.embeds_1LD.shape[1]
        self.embeds_RLD[row, :tokens] = embedded.embeds_1LD[0]
        self.embeds_RLD[row, tokens:] = 0
        self.mask_RL[row, :tokens] = embedded.mask_1L[0]
        self.mask_RL[row, tokens:] = False


class Denoiser:
    """Calls the pipeline's denoiser for several clips at once and applies each clip's guidance."""

    def __init__(self, pipeline: TangoPipeline, shapes: Sequence[int], *, exact: bool) -> None:
        self._pipeline = pipeline
        # Asked for once: the library's property walks through all parts of the pipeline.
        self._paced = pipeline.device.type == "cuda"
        self._shapes = shapes
        self._exact = exact
        self._buffers: OrderedDict[tuple[GroupKey, int], _Buffers] = OrderedDict()
        self._pending: torch.cuda.Event | None = None

    def __call__(self, key: GroupKey, slots: Sequence[Slot]) -> tuple[list[Tensor], int]:
        """Return each slot's guided velocity, [1, C, T, F] in float32, and the rows of the call."""
        rows = choose_rows(sum(slot.rows for slot in slots), self._shapes, exact=self._exact)
        buffers = self._buffers_for(key, slots[0], rows)
        buffers.fill(slots)
        velocity_RCTF = self._pipeline.predict(
            buffers.latents_RCTF, buffers.timesteps_R, buffers.embeds_RLD, buffers.mask_RL
        )
        self._pace()
        return _guided(velocity_RCTF, slots), rows

    def forget(self) -> None:
        """Let go of the last calls' slots, so that an idle engine holds no caller's prompt or latents."""
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


def _guided(velocity_RCTF: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
    """Return each guided slot's two rows as one, and the single row of others as it is."""
    guided: list[Tensor] = []
    row = 0
    for slot in slots:
        velocity_1CTF = velocity_RCTF[row : row + 1]
        if slot.rows == GUIDED_ROWS:
            conditional_1CTF = velocity_RCTF[row + 1 : row + 2]
            scale = slot.job.request.guidance_scale
            velocity_1CTF = guide(velocity_1CTF, conditional_1CTF, scale)
        guided.append(velocity_1CTF)
        row += slot.rows
    return guided
