"""Convert released checkpoints (Tango, Tango-full-FT, Tango 2, Tango-2-full) to model folders.

A released folder holds ``{main,vae,stft}_config.json`` and three pickled state dictionaries: the UNet and
FLAN-T5 in ``pytorch_model_main.bin``, AudioLDM's autoencoder and HiFi-GAN in ``pytorch_model_vae.bin``, the
mel filters in ``pytorch_model_stft.bin``. Source of this layout, and of the arithmetic that the converted
parts
reproduce: declare-lab/tango at 34ecd38 (``tango.py``, ``models.py``, ``audioldm/``).

Shapes: C channels, K spectrum bins, M mel bins.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    SpeechT5HifiGan,
    T5Config,
    T5EncoderModel,
)

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.conversion import Progress, Weights, folder_or_hub
from services.models.folders import cause, describe_weights, read_json, read_pickle
from services.models.hifigan import build_hifigan
from services.models.manifest import write_manifest
from services.models.mel import mel_filterbank
from services.models.state_dicts import assign_weights, check_finite, on_meta, quiet_loading, report_faults
from services.models.tango.pipeline import TangoPipeline
from services.models.tango.schedulers import SD21_CONFIG
from services.models.writing import new_folder

MAIN, VAE, STFT = "pytorch_model_main.bin", "pytorch_model_vae.bin", "pytorch_model_stft.bin"
RELEASED_FILES: Final = ("main_config.json", "vae_config.json", "stft_config.json", MAIN, VAE, STFT)
"""Files of a released folder."""

LICENSE: Final = "non-commercial (see the checkpoint's own model card)"
"""Upstream's weights are published for non-commercial use; each model card states the licence."""

SCHEDULER_NAMES: Final = ("stabilityai/stable-diffusion-2-1",)
"""Known values of `scheduler_name` in `main_config.json`. The repository has left the hub; its schedule is
`SD21_CONFIG`."""

MAX_DURATION = 20.48
"""Maximum duration in seconds: twice the 10.24 s of training. The denoiser itself has no limit."""

UNET_CONFIG: Final[Mapping[str, Any]] = {
    "act_fn": "silu",
    # Despite its name, the number of heads: diffusers keeps that meaning for old configs.
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 8,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "sample_size": [32, 2],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
    "upcast_attention": True,
}
"""Upstream's `configs/diffusion_model_config.json`, which released folders refer to, but lack."""

UNET_CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "diffusion_model_config.json": UNET_CONFIG,
    "diffusion_model_xl_config.json": {**UNET_CONFIG, "cross_attention_dim": 2048},
}
"""Configs by the file name in `unet_model_config_path`."""

HIFIGAN_CONFIG: Final[Mapping[str, Any]] = {
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
}
"""`HIFIGAN_16K_64` of upstream's `audioldm/hifigan`; the width is read from the weights."""

_TEXT_ENCODER_FILES: Final = ("config.json", "tokenizer*", "special_tokens_map.json", "spiece.model")
_MEL_TOLERANCE = 1e-4
_SMALLEST_VOCABULARY = 16
"""Minimum number of ordinary tokens: without its files, T5's tokenizer has one."""


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    text_encoder: str,
    progress: Progress | None = None,
    name: str | None = None,
    version: str = "1",
    license: str = LICENSE,
) -> Path:
    """Convert the released checkpoint in `source` to a new model folder `target`, and return that.

    Weights keep their float32 values, and are converted one part at a time. `target` appears only when it is
    complete.

    Args:
        source: folder of the released checkpoint.
        target: model folder to create.
        text_encoder: folder, or ``hf:OWNER/NAME``, with FLAN-T5's config and tokenizer, which `source` lacks.
        progress: called with the name of each stage.
        name: name in the manifest; None: that of the source folder.
        version: version in the manifest.
        license: licence in the manifest.

    Raises:
        ModelNotFoundError: a file is missing in `source`, or there is no folder of the text encoder.
        ModelFormatError: keys, shapes or settings are not as expected (lists all), a file holds no weights,
            or other than finite ones, a pickle holds more than tensors, or the vocabulary is empty.
        OutputError: `target` exists already or can't be written.
    """
    report = progress or (lambda _: None)
    _require_released(source)
    text_folder = folder_or_hub("text encoder", text_encoder, "google/flan-t5-large", _TEXT_ENCODER_FILES)
    main_config = read_json(source / "main_config.json")
    vae_config = read_json(source / "vae_config.json")
    stft_config = read_json(source / "stft_config.json")
    check_main_config(main_config)
    with quiet_loading():
        tokenizer, text_config = load_text_config(text_folder)
    with new_folder(target) as folder, quiet_loading():
        report("mel filters")
        check_stft(stft_config, read_weights(source / STFT))

        report("autoencoder and vocoder")
        weights = split_vae(read_weights(source / VAE))
        vae = _saved(build_vae(vae_config, weights["vae"]), folder / "vae")
        vocoder = _saved(build_vocoder(stft_config, weights["vocoder"]), folder / "vocoder")
        del weights

        report("text encoder")
        weights = split_main(read_weights(source / MAIN))
        encoder = build_text_encoder(text_config, weights.pop("text_encoder"))
        encoder = _saved(encoder, folder / "text_encoder")

        report("denoiser")
        unet = _saved(build_unet(unet_config(source, main_config), weights.pop("unet")), folder / "unet")

        pipeline = TangoPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            unet=unet,
            vae=vae,
            vocoder=vocoder,
            scheduler=DDPMScheduler(**SD21_CONFIG),
            default_duration=10.24,
            max_duration=MAX_DURATION,
            # Upstream's `Tango.generate`: 100 steps, guidance 3, ancestral sampling.
            default_num_inference_steps=100,
            default_guidance_scale=3.0,
            default_scheduler="ddpm",
            sampling_rate=stft_config["sampling_rate"],
            hop_length=stft_config["hop_length"],
            mel_bins=stft_config["n_mel_channels"],
        )
        tokenizer.save_pretrained(folder / "tokenizer")
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        pipeline.save_config(folder)
        report("manifest")
        write_manifest(folder, name or source.resolve().name, version, license)
    return target


def _saved(part: Any, folder: Path) -> Any:
    """Save a part of the pipeline, and return it without its weights, which would fill the memory."""
    part.save_pretrained(folder)
    return part.to("meta")


# ------------------------------------------------------------------------------------------------ reading


def read_weights(path: Path) -> Weights:
    """Return the tensors of a pickled state dictionary, memory-mapped if the format allows it.

    Raises `ModelFormatError` unless it is a plain dictionary of finite tensors. No code in it is executed.
    """
    weights = read_pickle(path)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelFormatError(f"{path} is no plain state dictionary; it must map names to tensors")
    check_finite(str(path), weights)
    return weights


def check_main_config(config: Mapping[str, Any]) -> None:
    """Raise `ModelFormatError` for settings of `main_config.json` that are not known; any may be absent."""
    faults = []
    if config.get("unet_model_name") is not None:
        faults.append(
            f"unet_model_name is {config['unet_model_name']!r}: only UNets trained from scratch are known"
        )
    scheduler = config.get("scheduler_name", SCHEDULER_NAMES[0])
    if scheduler not in SCHEDULER_NAMES:
        faults.append(f"scheduler_name is {scheduler!r}: only {', '.join(SCHEDULER_NAMES)} is known")
    report_faults("main_config.json", [("unknown settings", faults)])


def unet_config(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the UNet's config that `main_config.json` names: from `source` if it is there, or embedded."""
    named = str(config.get("unet_model_config_path") or "configs/diffusion_model_config.json")
    path = source / named
    if path.resolve().is_relative_to(source.resolve()) and path.is_file():
        return {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    embedded = UNET_CONFIGS.get(Path(named).name)
    if embedded is None:
        raise ModelFormatError(
            f"main_config.json names {named}, which is unknown; put that file into {source}"
        )
    return dict(embedded)


def load_text_config(folder: Path) -> tuple[PreTrainedTokenizerBase, T5Config]:
    """Return the tokenizer and the T5 config in `folder`.

    Raises `ModelFormatError` for another model or an empty vocabulary: without the vocabulary's file,
    transformers creates a tokenizer that has only special tokens, and reports no error.
    """
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != "t5":
        raise ModelFormatError(
            f"text encoder: {folder} holds a {settings.get('model_type')!r} model, not a t5 one"
        )
    try:
        config = T5Config.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # missing or damaged files raise errors of several libraries
        raise ModelFormatError(
            f"text encoder: {folder} holds no usable config and tokenizer: {cause(folder, error)}"
        ) from error
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(ordinary) < _SMALLEST_VOCABULARY:
        raise ModelFormatError(
            f"text encoder: the tokenizer in {folder} has an empty vocabulary ({len(ordinary)} ordinary "
            "tokens); add tokenizer.json or spiece.model"
        )
    if len(tokenizer) > config.vocab_size:
        raise ModelFormatError(
            f"text encoder: {folder} has {len(tokenizer)} tokens for {config.vocab_size} embeddings; "
            "tokenizer and config belong to different models"
        )
    return tokenizer, config


# ----------------------------------------------------------------------------------------- keys and parts


def split_main(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """Return ``unet`` and ``text_encoder`` of `pytorch_model_main.bin`, with the libraries' own keys."""
    return _split(MAIN, weights, {"unet": "unet.", "text_encoder": "text_encoder."})


def split_vae(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """Return ``vae`` and ``vocoder`` of `pytorch_model_vae.bin`, with upstream's keys."""
    vocoder = _split(
        VAE, {k: v for k, v in weights.items() if k.startswith("vocoder.")}, {"vocoder": "vocoder."}
    )
    return {"vae": {k: v for k, v in weights.items() if not k.startswith("vocoder.")}, **vocoder}


def build_unet(config: Mapping[str, Any], weights: Weights) -> UNet2DConditionModel:
    """Return the denoiser. Raises `ModelFormatError` unless every key matches."""
    return assign_weights("unet", on_meta(lambda: UNet2DConditionModel.from_config(dict(config))), weights)


def build_text_encoder(config: T5Config, weights: Weights) -> T5EncoderModel:
    """Return FLAN-T5's encoder. Raises `ModelFormatError` unless every key matches."""
    return assign_weights("text_encoder", on_meta(lambda: T5EncoderModel(config)), weights)


def build_vae(config: Mapping[str, Any], weights: Weights) -> AutoencoderKL:
    """Return AudioLDM's autoencoder as diffusers' class. Raises `ModelFormatError` unless every key matches.

    `config` is the content of `vae_config.json`; `weights` has upstream's keys.
    """
    settings = vae_settings(config)
    levels = len(settings["block_out_channels"])
    renamed = {rename_vae_key(key, levels): _unconvolved(key, tensor) for key, tensor in weights.items()}
    return assign_weights("vae", on_meta(lambda: AutoencoderKL(**settings)), renamed)


def build_vocoder(config: Mapping[str, Any], weights: Weights) -> SpeechT5HifiGan:
    """Return HiFi-GAN as transformers' class. Raises `ModelFormatError` unless every key matches.

    `config` is the content of `stft_config.json`.
    """
    return cast(SpeechT5HifiGan, build_hifigan(HIFIGAN_CONFIG, config["sampling_rate"], weights))


def check_stft(config: Mapping[str, Any], weights: Weights) -> None:
    """Raise `ModelFormatError` unless `weights` are the filters that `services.models.mel` computes.

    They are constants, so they are not converted: Slaney's mel filters ``mel_basis`` [M, K], and two Fourier
    bases, forward and inverse [2 K, 1, filter_length].
    """
    required = (
        "filter_length",
        "hop_length",
        "win_length",
        "n_mel_channels",
        "sampling_rate",
        "mel_fmin",
        "mel_fmax",
    )
    absent = [key for key in required if key not in config]
    report_faults("stft_config.json", [("missing settings", absent)])
    n_fft, mel_bins = config["filter_length"], config["n_mel_channels"]
    bins = n_fft // 2 + 1
    expected = {
        "mel_basis": (mel_bins, bins),
        "stft_fn.forward_basis": (2 * bins, 1, n_fft),
        "stft_fn.inverse_basis": (2 * bins, 1, n_fft),
    }
    wrong = [
        f"{key} is {list(weights[key].shape)}, not {list(shape)}"
        for key, shape in expected.items()
        if key in weights and tuple(weights[key].shape) != shape
    ]
    faults = (
        ("missing keys", [key for key in expected if key not in weights]),
        ("unknown keys", [key for key in weights if key not in expected]),
        ("wrong shapes", wrong),
    )
    report_faults(STFT, faults)
    if weights["mel_basis"].is_meta:
        return
    filters_KM = mel_filterbank(
        sampling_rate=config["sampling_rate"],
        n_fft=n_fft,
        mel_bins=mel_bins,
        minimum_hertz=config["mel_fmin"],
        maximum_hertz=config["mel_fmax"],
    )
    distance = float((weights["mel_basis"].float() - filters_KM.T).abs().max())
    if not distance <= _MEL_TOLERANCE:
        raise ModelFormatError(f"{STFT}: mel_basis differs from Slaney's mel filters by {distance:.2g}")


def vae_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of diffusers' `AutoencoderKL` for upstream's `vae_config.json`."""
    inner = config.get("ddconfig")
    if not isinstance(inner, dict):
        raise ModelFormatError("vae_config.json: ddconfig is missing")
    needed = ("ch", "ch_mult", "num_res_blocks", "z_channels", "in_channels", "out_ch", "resolution")
    missing = [f"ddconfig.{key}" for key in needed if key not in inner]
    missing += [key for key in ("scale_factor", "embed_dim") if key not in config]
    report_faults("vae_config.json", [("missing settings", missing)])
    fixed: tuple[tuple[str, Any, Any], ...] = (
        ("subband", config.get("subband", 1), 1),
        ("time_shuffle", config.get("time_shuffle", 1), 1),
        ("embed_dim", config["embed_dim"], inner["z_channels"]),
        ("ddconfig.double_z", inner.get("double_z", True), True),
        ("ddconfig.downsample_time", inner.get("downsample_time", False), False),
        ("ddconfig.attn_resolutions", inner.get("attn_resolutions", []), []),
    )
    unknown = [
        f"{key} is {value!r}, only {known!r} is known" for key, value, known in fixed if value != known
    ]
    report_faults("vae_config.json", [("unknown settings", unknown)])
    channels = tuple(inner["ch"] * factor for factor in inner["ch_mult"])
    return {
        "in_channels": inner["in_channels"],
        "out_channels": inner["out_ch"],
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": inner["num_res_blocks"],
        "latent_channels": inner["z_channels"],
        "sample_size": inner["resolution"],
        "scaling_factor": config["scale_factor"],
    }


_VAE_RULES: Final[tuple[tuple[str, str], ...]] = (
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"\.norm_out\.", r".conv_norm_out."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
)


def rename_vae_key(key: str, levels: int) -> str:
    """Return diffusers' name for a key of AudioLDM's autoencoder with `levels` resolutions.

    Upstream counts the decoder's levels from the finest, diffusers from the coarsest. A key without a rule
    stays, and is reported as unknown later.
    """
    for pattern, replacement in _VAE_RULES:
        key = re.sub(pattern, replacement, key)
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}.", key)


def _unconvolved(key: str, tensor: Tensor) -> Tensor:
    """Return attention's 1 x 1 convolutions [C, C, 1, 1] as the linear layers [C, C] of diffusers."""
    is_projection = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", key) and tensor.shape[2:] == (1, 1)
    return tensor[:, :, 0, 0].contiguous() if is_projection else tensor


def _split(file: str, weights: Weights, prefixes: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Group `weights` by prefix, and remove it. Raises `ModelFormatError` for a key without a prefix."""
    unknown = [key for key in weights if not key.startswith(tuple(prefixes.values()))]
    report_faults(file, [("unknown keys", unknown)])
    return {
        part: {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        for part, prefix in prefixes.items()
    }


# ------------------------------------------------------------------------------------------------ folders


def _require_released(source: Path) -> None:
    if not source.is_dir():
        raise ModelNotFoundError(f"{source} is not a folder; give that of a released Tango checkpoint")
    missing = [name for name in RELEASED_FILES if not (source / name).is_file()]
    if missing:
        raise ModelNotFoundError(f"{source} is no released Tango checkpoint: {', '.join(missing)} missing")
    # All at once, and before the first part is converted: a clone without LFS has nothing but pointers.
    known = ((path, describe_weights(path)) for path in (source / MAIN, source / VAE, source / STFT))
    if wrong := [f"{path} is {found}" for path, found in known if found]:
        raise ModelFormatError("; ".join(wrong))
