"""`load_laion`: load a `ClapModel` from a LAION CLAP checkpoint, such as ``630k-best.pt``.

A checkpoint is a pickled dictionary whose ``state_dict`` holds RoBERTa under ``text_branch``, HTS-AT under
``audio_branch`` and two projections; names begin with ``module.`` if it was trained with DataParallel.
transformers' class computes the same with other names (`convert_state`). Its sizes are read from the weights
(`laion_config`); its other settings are those of laion_clap 1.1.7. ``make parity`` compares the two.

Checkpoints lack RoBERTa's tokenizer: see `find_tokenizer`.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.clap.model import QUANTISE, ClapModel
from services.models.folders import one_line, pick_device, read_pickle
from services.models.state_dicts import assign_weights, check_weights, on_meta, quiet_loading, report_faults
from services.models.words import load_tokenizer

Weights = Mapping[str, Tensor]
"""A state dictionary."""

TEXT_BRANCH, AUDIO_BRANCH = "text_branch.", "audio_branch."
"""Prefixes of keys by which a LAION checkpoint is recognised."""

DROPPED: Final = (
    r"text_branch\.embeddings\.(position_ids|token_type_ids)",  # indices
    r"audio_branch\.(spectrogram|logmel)_extractor\..+",  # Fourier bases and mel filters, see `check_filters`
    r"audio_branch\.layers\.\d+\.blocks\.\d+\.attn_mask",  # computed in each pass
    r"audio_branch\.layers\.\d+\.blocks\.\d+\.attn\.relative_position_index",  # indices
    r"audio_branch\.(tscam_conv|head)\..+",  # the classifier of AudioSet's classes
    r"(text|audio)_transform\.sequential\..+",  # layers of a training loss
)
"""Keys that transformers' class lacks, and that don't affect embeddings."""

RULES: Final = (
    (r"^text_branch\.", r"text_model."),
    (r"^audio_branch\.", r"audio_model.audio_encoder."),
    (r"^(text|audio)_projection\.0\.", r"\1_projection.linear1."),
    (r"^(text|audio)_projection\.2\.", r"\1_projection.linear2."),
    (r"^(audio_model\.audio_encoder)\.bn0\.", r"\1.batch_norm."),
    (r"\.attn\.proj\.", r".attention.output.dense."),
    (r"\.attn\.(q|k|v|relative)", r".attention.self.\1"),
    (r"\.mlp\.fc1\.", r".intermediate.dense."),
    (r"\.mlp\.fc2\.", r".output.dense."),
    (r"\.norm1\.", r".layernorm_before."),
    (r"\.norm2\.", r".layernorm_after."),
)
"""Patterns in LAION's names and their replacements in transformers', applied in order."""

ARCHITECTURES: Final[Mapping[tuple[int, tuple[int, ...]], str]] = {
    (96, (2, 2, 6, 2)): "HTSAT-tiny",
    (128, (2, 2, 12, 2)): "HTSAT-base",
    (256, (2, 2, 12, 2)): "HTSAT-large",
}
"""laion_clap's names of audio encoders, by width and depths."""

FUSION: Final = "aff_2d"
"""Fusion type of the published fused models, the only one that transformers implements."""

SAMPLING_RATE, WINDOW_SECONDS, HOP_LENGTH = 48_000, 10, 480
"""Sampling rate in hertz, window in seconds and hop in samples of the models' inputs."""

FREQUENCY_MIN, FREQUENCY_MAX = 50, 14_000
"""Range of the mel filters in hertz."""

SPEC_SIZE: Final = 256
"""Height and width of the image that HTS-AT folds a spectrogram into."""

TEXT_EPSILON: Final = 1e-5
"""RoBERTa's layer_norm_eps; transformers' default for CLAP is 1e-12."""

PADDING_TOKEN: Final = 1
"""RoBERTa's padding token. Positions are counted from it, so that another value would shift them."""

HEAD_WIDTH: Final = 64
"""Channels of one of RoBERTa's attention heads."""

TOKENIZER: Final = "FacebookAI/roberta-base"
"""The tokenizer's repository on the hub."""

TOKENIZER_FILES: Final = (
    *("config.json", "tokenizer.json", "tokenizer_config.json"),
    *("vocab.json", "merges.txt", "special_tokens_map.json"),
)
"""Files of a tokenizer's folder; some are optional."""

_FILTER_TOLERANCE: Final = 1e-5
"""Filters of the correct range differ by 1e-9, filters that begin at 0 Hz by 1e-2."""


class _Ignored:
    """Replaces numpy objects in an optimizer's state, which `weights_only` would refuse."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_NUMPY: Final = tuple(
    (_Ignored, name)
    for name in (
        *("numpy.dtype", "numpy.ndarray"),
        *(
            f"numpy.{core}.multiarray.{function}"
            for core in ("core", "_core")
            for function in ("scalar", "_reconstruct")
        ),
    )
)


def load_laion(path: Path, *, tokenizer: Path | None = None, device: str = "cpu") -> ClapModel:
    """Load the CLAP model in the checkpoint `path`, in float32 on `device` (torch's name, or ``auto``).

    `tokenizer` is the folder of RoBERTa's tokenizer; None: `find_tokenizer` searches for it.

    Raises:
        ModelNotFoundError: the checkpoint or the tokenizer is missing.
        ModelFormatError: keys are missing or unknown (lists all), the pickle would run code, the file is
            truncated, or the tokenizer has another vocabulary.
        InvalidInputError: the device does not exist.
    """
    target = pick_device(device)
    state = read_state(path)
    config = laion_config(path.name, state)
    try:
        with quiet_loading():
            module = on_meta(lambda: transformers.ClapModel(config))
            extractor = laion_extractor(config, state)
    except Exception as error:  # sizes that transformers' classes refuse raise several kinds
        raise ModelFormatError(f"{path.name}: these sizes are no CLAP model's: {one_line(error)}") from error
    weights = convert_state(state) | _counters(module)
    check_weights(path.name, module, weights)
    check_filters(path.name, state, extractor)
    text_tokenizer = load_text_tokenizer(path, tokenizer, config)
    # Copied: the file may be memory-mapped, and half precision becomes float32.
    copies = {
        key: tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for key, tensor in weights.items()
    }
    clap = assign_weights(path.name, module, copies)
    return ClapModel(clap, text_tokenizer, extractor).to(target).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ reading


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dictionary of the checkpoint `path`, without ``module.``; memory-mapped if possible.

    Nothing in it is executed; see `read_pickle`. numpy objects in an optimizer's state are ignored.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFormatError: the file is no LAION checkpoint with an HTSAT audio encoder.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is not a file; give the path of a LAION checkpoint (.pt)")
    data = read_pickle(path, ignored=_NUMPY)
    state = data.get("state_dict", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ModelFormatError(f"{path} is no LAION checkpoint: it holds no state_dict of tensors by name")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if not is_laion(state):
        raise ModelFormatError(
            f"{path} is no LAION checkpoint: it has no keys that begin with {TEXT_BRANCH} and {AUDIO_BRANCH}"
        )
    if any(key.startswith(f"{AUDIO_BRANCH}conv_block1.") for key in state):
        raise ModelFormatError(f"{path}: its audio encoder is PANN, and only HTSAT is supported")
    return dict(state)


def is_laion(state: Weights) -> bool:
    """Return whether a state dictionary (without ``module.``) has LAION's keys."""
    return all(any(key.startswith(branch) for key in state) for branch in (TEXT_BRANCH, AUDIO_BRANCH))


def find_tokenizer(path: Path, given: Path | None = None) -> Path:
    """Return the folder of RoBERTa's tokenizer for the checkpoint `path`.

    The first of: `given`, ``roberta-base`` next to the checkpoint, the checkpoint's folder if it has a
    tokenizer's files, the hub's cache, the hub. Raises `ModelNotFoundError` if there is none.
    """
    if given is not None:
        return given
    adjacent = path.parent / "roberta-base"
    if adjacent.is_dir():
        return adjacent
    if (path.parent / "tokenizer.json").is_file() or (path.parent / "vocab.json").is_file():
        return path.parent
    from huggingface_hub import snapshot_download  # imported only if there is no local tokenizer

    faults = []
    # The repository was renamed: an old cache has its first name. The hub comes last.
    for name, offline in ((TOKENIZER, True), ("roberta-base", True), (TOKENIZER, False)):
        try:
            found = snapshot_download(name, allow_patterns=list(TOKENIZER_FILES), local_files_only=offline)
        except Exception as error:  # the hub's client raises errors of several libraries
            faults.append(error)
            continue
        return Path(found)
    raise ModelNotFoundError(
        f"{path.name} needs RoBERTa's tokenizer, which is not in the hub's cache and can't be fetched "
        f"({one_line(faults[-1])}); put the tokenizer's files of {TOKENIZER} into {adjacent}"
    ) from faults[-1]


def load_text_tokenizer(
    path: Path, folder: Path | None, config: transformers.ClapConfig
) -> transformers.PreTrainedTokenizerBase:
    """Load RoBERTa's tokenizer for the checkpoint `path`, from `folder` or by `find_tokenizer`.

    Raises `ModelFormatError` if it is another model's tokenizer.
    """
    tokenizer = load_tokenizer(find_tokenizer(path, folder), config.text_config.vocab_size)
    if tokenizer.pad_token_id != PADDING_TOKEN:
        raise ModelFormatError(
            f"{path.name}: the tokenizer's padding token is {tokenizer.pad_token_id}, but RoBERTa's is "
            f"{PADDING_TOKEN}; give the folder of {TOKENIZER}"
        )
    return tokenizer


# ----------------------------------------------------------------------------------------------- keys, sizes


def convert_state(state: Weights) -> dict[str, Tensor]:
    """Rename a checkpoint's weights (without ``module.``) to transformers' names, without those in `DROPPED`.

    Splits query, key and value of the audio encoder, one tensor upstream. Keys without a rule stay, and are
    reported as unknown later.
    """
    dropped = re.compile("|".join(DROPPED))
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if dropped.fullmatch(key):
            continue
        found = re.fullmatch(r"(audio_branch\..+\.attn\.)qkv(\.\w+)", key)
        if found and tensor.ndim and len(tensor) % 3 == 0:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            converted |= {rename(f"{found[1]}{name}{found[2]}"): part for name, part in parts}
        else:
            converted[rename(key)] = tensor
    return converted


def rename(key: str) -> str:
    """Return transformers' name for one of LAION's."""
    for pattern, replacement in RULES:
        key = re.sub(pattern, replacement, key)
    return key


def laion_config(part: str, state: Weights) -> transformers.ClapConfig:
    """Return transformers' configuration for a checkpoint, with sizes from its weights' shapes.

    The sizes of missing tensors are those of HTSAT-tiny and RoBERTa; the check of keys reports them later.
    `part` names the checkpoint in messages. Raises `ModelFormatError`.
    """

    def size(key: str, axis: int, default: int) -> int:
        tensor = state.get(key)
        return default if tensor is None or tensor.ndim <= axis else int(tensor.shape[axis])

    text = f"{TEXT_BRANCH}encoder.layer."
    text_width = size(f"{TEXT_BRANCH}embeddings.word_embeddings.weight", 1, 768)
    projection = size("text_projection.0.weight", 0, 512)
    patch = f"{AUDIO_BRANCH}patch_embed."
    width = size(f"{patch}proj.weight", 0, 96)
    depths = _depths(state)
    table = AUDIO_BRANCH + "layers.{}.blocks.0.attn.relative_position_bias_table"
    fusion = fusion_type(state)
    if fusion not in (None, FUSION):
        raise ModelFormatError(
            f"{part}: this model's fusion type is {fusion}, but only {FUSION} is supported"
        )
    audio: dict[str, Any] = {
        "window_size": (math.isqrt(size(table.format(0), 0, 225)) + 1) // 2,
        "num_mel_bins": size(f"{AUDIO_BRANCH}bn0.weight", 0, 64),
        "spec_size": SPEC_SIZE,
        "patch_size": size(f"{patch}proj.weight", 2, 4),
        "patch_stride": [size(f"{patch}proj.weight", 2, 4)] * 2,
        "patch_embeds_hidden_size": width,
        "depths": depths,
        "num_hidden_layers": len(depths),
        "num_attention_heads": [size(table.format(layer), 1, 4 * 2**layer) for layer in range(len(depths))],
        "hidden_size": width * 2 ** (len(depths) - 1),
        "mlp_ratio": size(f"{AUDIO_BRANCH}layers.0.blocks.0.mlp.fc1.weight", 0, 4 * width) / max(width, 1),
        "enable_fusion": fusion is not None,
        "fusion_type": fusion,
        "aff_block_r": width // max(size(f"{patch}fusion_model.local_att.0.weight", 0, width // 4), 1),
        "projection_dim": projection,
    }
    words: dict[str, Any] = {
        "vocab_size": size(f"{TEXT_BRANCH}embeddings.word_embeddings.weight", 0, 50_265),
        "hidden_size": text_width,
        "num_hidden_layers": _count(rf"{re.escape(text)}(\d+)\.", state) or 12,
        "num_attention_heads": max(1, text_width // HEAD_WIDTH),
        "intermediate_size": size(f"{text}0.intermediate.dense.weight", 0, 4 * text_width),
        "max_position_embeddings": size(f"{TEXT_BRANCH}embeddings.position_embeddings.weight", 0, 514),
        "type_vocab_size": size(f"{TEXT_BRANCH}embeddings.token_type_embeddings.weight", 0, 1),
        "layer_norm_eps": TEXT_EPSILON,
        "pad_token_id": PADDING_TOKEN,
        "projection_dim": projection,
    }
    try:
        return transformers.ClapConfig(text_config=words, audio_config=audio, projection_dim=projection)
    except Exception as error:  # validation of strict dataclasses raises several classes
        raise ModelFormatError(f"{part}: these sizes are no CLAP model's: {one_line(error)}") from error


def architecture(part: str, config: transformers.ClapConfig) -> str:
    """Return laion_clap's name of the audio encoder, such as ``HTSAT-tiny``. Raises `ModelFormatError`."""
    audio = config.audio_config
    sizes = (audio.patch_embeds_hidden_size, tuple(audio.depths))
    if sizes not in ARCHITECTURES:
        known = ", ".join(f"{name} {width} {depths}" for (width, depths), name in ARCHITECTURES.items())
        raise ModelFormatError(
            f"{part}: an audio encoder of width {sizes[0]} and depths {sizes[1]} is unknown to laion_clap "
            f"({known})"
        )
    return ARCHITECTURES[sizes]


def fusion_type(state: Weights) -> str | None:
    """Return a fused model's fusion type, by laion_clap's names; None for an unfused model."""

    def has(key: str) -> bool:
        return any(name.startswith(AUDIO_BRANCH + key) for name in state)

    if has("mel_conv1d.") or has("fusion_model."):
        return "1d"
    patches = state.get(f"{AUDIO_BRANCH}patch_embed.proj.weight")
    if patches is not None and patches.ndim > 1 and patches.shape[1] != 1:
        return "channel_map"
    if has("patch_embed.fusion_model.local_att2."):
        return "iaff_2d"
    if has("patch_embed.fusion_model."):
        return FUSION
    return "daf_2d" if has("patch_embed.mel_conv2d.") else None


def laion_extractor(config: transformers.ClapConfig, state: Weights) -> transformers.ClapFeatureExtractor:
    """Return the settings of laion_clap's spectrogram, 16-bit rounding included."""
    basis = state.get(f"{AUDIO_BRANCH}spectrogram_extractor.stft.conv_real.weight")
    audio = config.audio_config
    return transformers.ClapFeatureExtractor(
        feature_size=audio.num_mel_bins,
        sampling_rate=SAMPLING_RATE,
        hop_length=HOP_LENGTH,
        max_length_s=WINDOW_SECONDS,
        fft_window_size=1024 if basis is None else int(basis.shape[-1]),
        frequency_min=FREQUENCY_MIN,
        frequency_max=FREQUENCY_MAX,
        truncation="fusion" if audio.enable_fusion else "rand_trunc",
        padding="repeatpad",
        **{QUANTISE: True},
    )


def check_filters(part: str, state: Weights, extractor: transformers.ClapFeatureExtractor) -> None:
    """Raise `ModelFormatError` if the checkpoint holds mel filters [K, M] that are not the extractor's."""
    key = f"{AUDIO_BRANCH}logmel_extractor.melW"
    if key not in state:
        return
    expected_KM = torch.from_numpy(extractor.mel_filters_slaney).float()
    found_KM = state[key].float()
    if found_KM.shape != expected_KM.shape:
        fault = f"{key} is {list(found_KM.shape)}, not {list(expected_KM.shape)}"
        report_faults(part, [("wrong shapes", [fault])])
    distance = float((found_KM - expected_KM).abs().max())
    if not distance <= _FILTER_TOLERANCE:
        raise ModelFormatError(
            f"{part}: {key} differs by {distance:.2g} from mel filters of {FREQUENCY_MIN} to {FREQUENCY_MAX} "
            f"Hz at {SAMPLING_RATE} Hz, which every published model has"
        )


def _counters(module: transformers.ClapModel) -> dict[str, Tensor]:
    """Return the index buffers of `module`, which checkpoints need not have."""
    buffers = {}
    for key, tensor in module.state_dict().items():
        if key.endswith(".position_ids"):
            buffers[key] = torch.arange(tensor.shape[-1]).expand(tensor.shape).contiguous()
        elif key.endswith(".token_type_ids"):
            buffers[key] = torch.zeros(tensor.shape, dtype=torch.long)
        elif key.endswith(".relative_position_index"):
            buffers[key] = relative_positions(math.isqrt(tensor.shape[-1]))
    return buffers


def relative_positions(size: int) -> Tensor:
    """Return the bias table's row for each pair of positions, [size², size²] (Swin Transformer, eq. 4)."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    rows, columns = row.flatten(), column.flatten()
    down = rows[:, None] - rows + size - 1
    right = columns[:, None] - columns + size - 1
    return down * (2 * size - 1) + right


def _depths(state: Weights) -> list[int]:
    """Return the number of blocks of each layer of the audio encoder."""
    layers = _count(rf"{re.escape(AUDIO_BRANCH)}layers\.(\d+)\.", state)
    if not layers:
        return [2, 2, 6, 2]
    return [
        _count(rf"{re.escape(AUDIO_BRANCH)}layers\.{layer}\.blocks\.(\d+)\.", state)
        for layer in range(layers)
    ]


def _count(pattern: str, state: Weights) -> int:
    """Return the number of distinct values of the first group of `pattern` at the start of keys."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})
