"""PaSST (arXiv 2110.05069), from its public checkpoints: AudioSet's 527 classes, 768 dimensions.

::

    model = load_passt(Path("passt-s-f128-p16-s10-ap.476-swa.pt"))
    model(waveform_BN)                                  # TaggerOutput(embeddings_BD, logits_BK)

KL between its posteriors is what AudioGen and later papers report. Reimplements hear21passt 0.0.26
(``models/passt.py``, ``models/preprocess.py``, Apache-2.0) for inference, with the same names of weights: the
variants on 32 kHz with a hop of 320 samples. Verified against hear21passt with random weights, see
benchmarks/metrics.md; the released weights were not available.

Shape legend: B clips, N samples, T frames, M mel bins, F and P patches along frequency and time, S tokens,
H heads, D embedding width, K classes.
"""

import math
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.captioner.filterbank import mel_filters
from services.models.folders import pick_device, read_pickle
from services.models.state_dicts import assign_weights, check_weights, on_meta
from training.evaluation.panns import TaggerOutput

SAMPLING_RATE: Final = 32_000
"""Hertz."""
HOP_LENGTH: Final = 320
MEL_BINS: Final = 128
PATCH: Final = 16
"""Mel bins, and frames, of a patch."""
MAXIMUM_HERTZ: Final = 15_000.0
"""Upper end of the mel filters outside of training: 16 kHz less half of the range that training varies."""
_N_FFT: Final = 1_024
_WINDOW_LENGTH: Final = 800
_HEAD_WIDTH: Final = 64
_PRE_EMPHASIS: Final = 0.97
_FLOOR: Final = 1e-5
_MEAN, _SCALE = -4.5, 5.0
"""Of log-mel values, as upstream normalises them."""
_TRAINED_FRAMES: Final = 998
"""Frames that the positions cover: 10 s. Variants with other positions have other spectrograms."""


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        heads_3BHS = self.qkv(hidden_BSD).unflatten(2, (3, -1, _HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        mixed_BHS = functional.scaled_dot_product_attention(*heads_3BHS)
        output: Tensor = self.proj(mixed_BHS.transpose(1, 2).flatten(2))
        return output


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        output: Tensor = self.fc2(functional.gelu(self.fc1(hidden_BSD)))
        return output


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width), _FeedForward(width)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        hidden_BSD = hidden_BSD + self.attn(self.norm1(hidden_BSD))
        output: Tensor = hidden_BSD + self.mlp(self.norm2(hidden_BSD))
        return output


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, PATCH, stride)


class Passt(nn.Module):
    """PaSST with a class and a distillation token, from waveforms to embeddings and logits."""

    window: Tensor
    filters: Tensor

    def __init__(self, *, width: int, depth: int, classes: int, rows: int, columns: int) -> None:
        """Build a model of `depth` blocks for up to `columns` patches in time, of `rows` in frequency."""
        super().__init__()
        with torch.device("cpu"):  # these are in no checkpoint
            filters = mel_filters(
                MEL_BINS, sampling_rate=SAMPLING_RATE, n_fft=_N_FFT, low_hertz=0.0, high_hertz=MAXIMUM_HERTZ
            )
            window = torch.hann_window(_WINDOW_LENGTH, periodic=False)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", window, persistent=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.dist_token = nn.Parameter(torch.empty(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.empty(1, 2, width))
        self.freq_new_pos_embed = nn.Parameter(torch.empty(1, width, rows, 1))
        self.time_new_pos_embed = nn.Parameter(torch.empty(1, width, 1, columns))
        self.patch_embed = _PatchEmbedding(width, MEL_BINS // rows)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        self.head_dist = nn.Linear(width, classes)
        """In the checkpoints, and not used: the mean of both tokens goes through `head`."""

    @property
    def sampling_rate(self) -> int:
        """Hertz of the waveforms."""
        return SAMPLING_RATE

    @property
    def max_samples(self) -> int:
        """Longest clip that fits the positions; longer ones are read in parts."""
        stride, columns = self.patch_embed.proj.stride[1], self.time_new_pos_embed.shape[3]
        return ((columns - 1) * stride + PATCH + stride - 1) * HOP_LENGTH

    def forward(self, waveform_BN: Tensor) -> TaggerOutput:
        """Return the output for clips [B, N] in [-1, 1] at 32 kHz, the mean over parts of equal length."""
        count = math.ceil(waveform_BN.shape[1] / self.max_samples)
        outputs = [self._read(part_BN) for part_BN in waveform_BN.tensor_split(count, dim=1)]
        return TaggerOutput(
            embeddings_BD=torch.stack([one.embeddings_BD for one in outputs]).mean(0),
            logits_BK=torch.stack([one.logits_BK for one in outputs]).mean(0),
        )

    def _read(self, waveform_BN: Tensor) -> TaggerOutput:
        patches_BDFP = self.patch_embed.proj(self.log_mel(waveform_BN)[:, None])
        patches_BDFP = patches_BDFP + self.time_new_pos_embed[..., : patches_BDFP.shape[3]]
        patches_BDFP = patches_BDFP + self.freq_new_pos_embed
        tokens_1SD = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        tokens_BSD = tokens_1SD.expand(len(waveform_BN), -1, -1)
        hidden_BSD = torch.cat([tokens_BSD, patches_BDFP.flatten(2).transpose(1, 2)], dim=1)
        embeddings_BD = self.norm(self.blocks(hidden_BSD))[:, :2].mean(1)
        return TaggerOutput(embeddings_BD=embeddings_BD, logits_BK=self.head(embeddings_BD))

    def log_mel(self, waveform_BN: Tensor) -> Tensor:
        """Return the normalised log-mel spectrogram [B, M, T], of as many frames as a patch at least."""
        shortest = PATCH * HOP_LENGTH
        waveform_BN = functional.pad(waveform_BN, (0, max(0, shortest - waveform_BN.shape[1])))
        sharpened_BN = waveform_BN[:, 1:] - _PRE_EMPHASIS * waveform_BN[:, :-1]
        spectrum = torch.stft(
            sharpened_BN,
            _N_FFT,
            hop_length=HOP_LENGTH,
            win_length=_WINDOW_LENGTH,
            window=self.window,
            return_complex=True,
        )
        mel_BMT = self.filters.T @ torch.view_as_real(spectrum).square().sum(-1)
        return ((mel_BMT + _FLOOR).log() - _MEAN) / _SCALE


def load_passt(path: Path, device: str = "cpu") -> Passt:
    """Load PaSST from a released checkpoint, in float32 on `device`, for inference.

    No code in the file is executed. Raises `ModelNotFoundError` if there is no file, `ModelFormatError` if it
    has other keys or shapes, or is of a variant with another spectrogram.
    """
    target = pick_device(device)
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is not a file; give the path of a PaSST checkpoint (.pt)")
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelFormatError(f"{path} is no PaSST checkpoint: it must map names to tensors")
    frequency, time, head = (
        state.get(name) for name in ("freq_new_pos_embed", "time_new_pos_embed", "head.1.weight")
    )
    if frequency is None or time is None or head is None or {frequency.ndim, time.ndim, head.ndim} != {2, 4}:
        raise ModelFormatError(f"{path} is no PaSST checkpoint: it has no positions in frequency and time")
    rows, columns, (classes, width) = frequency.shape[2], time.shape[3], head.shape
    if not 0 < rows <= MEL_BINS or columns != _TRAINED_FRAMES // (MEL_BINS // rows):
        raise ModelFormatError(
            f"{path} has positions of {rows} x {columns} patches, so its spectrogram is another one; give a "
            "PaSST checkpoint for 10 s at a hop of 320, for example passt-s-f128-p16-s10-ap.476-swa.pt"
        )
    depth = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in state)
    model = on_meta(lambda: Passt(width=width, depth=depth, classes=classes, rows=rows, columns=columns))
    check_weights(path.name, model, state)
    assign_weights(path.name, model, state)
    return model.to(target).float().eval().requires_grad_(False)
