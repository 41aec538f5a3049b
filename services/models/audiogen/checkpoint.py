"""Convert released AudioGen checkpoints to model folders.

A released folder holds two pickled dictionaries with ``xp.cfg`` (YAML) and ``best_state`` (tensors): the
language model in ``state_dict.bin``, EnCodec in ``compression_state_dict.bin``. T5 is in neither. Source of
this layout, and of the arithmetic that the converted parts reproduce: facebookresearch/audiocraft at 896ec7c
(``models/loaders.py``, ``models/lm.py``, ``modules/transformer.py``, ``modules/seanet.py``,
``quantization/core_vq.py``).

The names of the keys are those of upstream's modules; the released files themselves were not seen.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]
from torch import Tensor
from transformers import (
    EncodecConfig,
    EncodecModel,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from services.errors import ModelFormatError, ModelNotFoundError
from services.models.audiogen.language_model import TextProjection
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.audiogen.sampling import TokenScheduler
from services.models.conversion import Progress, Weights, folder_or_hub
from services.models.folders import cause, one_line, read_pickle
from services.models.manifest import write_manifest
from services.models.state_dicts import (
    assign_weights,
    check_finite,
    check_weights,
    on_meta,
    quiet_loading,
    report_faults,
)
from services.models.tango.checkpoint import load_text_config
from services.models.writing import new_folder

LM, CODEC = "state_dict.bin", "compression_state_dict.bin"
"""Files of a released folder."""

LICENSE: Final = "CC-BY-NC-4.0 (see the checkpoint's own model card)"
MAX_DURATION = 10.0
"""Seconds of the clips that the released model was trained with."""

_TEXT_ENCODER_FILES: Final = ("*.json", "spiece.model", "model.safetensors")
_PROJECTION: Final = "condition_provider.conditioners.description.output_proj."
_LAYER: Final = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
_RENAMES: Final[Mapping[str, str]] = {
    "self_attn.out_proj.": "self_attn.out_proj.",
    "cross_attention.out_proj.": "encoder_attn.out_proj.",
    "linear1.": "fc1.",
    "linear2.": "fc2.",
    "norm1.": "self_attn_layer_norm.",
    "norm_cross.": "encoder_attn_layer_norm.",
    "norm2.": "final_layer_norm.",
}
"""Names within a layer of the language model, upstream's and ours."""
_FUSED: Final[Mapping[str, str]] = {
    "self_attn.in_proj_weight": "self_attn",
    "cross_attention.in_proj_weight": "encoder_attn",
}
"""Weights of queries, keys and values in one tensor."""

_LM_SETTINGS: Final[Mapping[str, Sequence[Any]]] = {
    "norm_first": (True,),
    "causal": (True,),
    "activation": ("gelu",),
    "norm": ("layer_norm",),
    "positional_embedding": ("sin",),
    "xpos": (False,),
    "kv_repeat": (1,),
    "layer_scale": (None,),
    "past_context": (None,),
    "qk_layer_norm": (False,),
    "qk_layer_norm_cross": (False,),
}
"""Values of ``transformer_lm`` that transformers' class computes; absent ones are upstream's defaults."""
_SEANET_SETTINGS: Final[Mapping[str, Sequence[Any]]] = {
    "activation": ("ELU",),
    "norm": ("weight_norm",),
    "disable_norm_outer_blocks": (0,),
    "causal": (False, True),
    "pad_mode": ("constant", "reflect"),
}
"""Values of ``seanet`` that transformers' class computes."""


def convert_audiogen(
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

    Weights keep their values and float types. `target` appears only when it is complete.

    Args:
        source: folder of the released checkpoint.
        target: model folder to create.
        text_encoder: folder, or ``hf:OWNER/NAME``, with T5's weights and tokenizer, which `source` lacks.
        progress: called with the name of each stage.
        name: name in the manifest; None: that of the source folder.
        version: version in the manifest.
        license: licence in the manifest.

    Raises:
        ModelNotFoundError: a file is missing in `source`, or there is no folder of the text encoder.
        ModelFormatError: keys, shapes or settings are not as expected (lists all), the codec refers to
            another model, parts do not fit each other, or a file holds no weights, or other than finite
            ones, or more than tensors and text.
        OutputError: `target` exists already or can't be written.
    """
    report = progress or (lambda _: None)
    for file in (LM, CODEC):
        if not (source / file).is_file():
            raise ModelNotFoundError(
                f"{source} has no {file}; give the folder of a released AudioGen checkpoint"
            )
    folder = folder_or_hub("text encoder", text_encoder, "t5-large", _TEXT_ENCODER_FILES)
    with quiet_loading(), new_folder(target) as made:
        report("language model")
        settings, weights = read_checkpoint(source / LM)
        decoder, projection = build_language_model(settings, weights)
        report("codec")
        codec = build_codec(*read_checkpoint(source / CODEC))
        report("text encoder")
        tokenizer, encoder = load_text_encoder(folder)
        report("model folder")
        AudioGenPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            projection=projection,
            decoder=decoder,
            codec=codec,
            scheduler=TokenScheduler(special=decoder.config.vocab_size),
            max_duration=MAX_DURATION,
        ).save_pretrained(made, safe_serialization=True)
        report("manifest")
        write_manifest(made, name or source.resolve().name, version, license)
    return target


# ------------------------------------------------------------------------------------------------ reading


def read_checkpoint(path: Path) -> tuple[Mapping[str, Any], Weights]:
    """Return the settings and the weights of one of upstream's exported files.

    No code in it is executed. Raises `ModelFormatError` if it has other content, or names another model.
    """
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ModelFormatError(f"{path} is no checkpoint of audiocraft: it must hold a dictionary")
    if "pretrained" in content:
        raise ModelFormatError(
            f"{path} holds no weights, but refers to the model {content['pretrained']!r}; give a "
            f"folder whose {path.name} has that model's own weights"
        )
    missing = [key for key in ("xp.cfg", "best_state") if key not in content]
    report_faults(str(path), [("missing keys", missing)])
    weights = content["best_state"]
    if isinstance(weights, dict) and set(weights) == {"model"}:  # before upstream's export
        weights = weights["model"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelFormatError(f"{path}: best_state is no state dictionary; it must map names to tensors")
    check_finite(str(path), weights)
    try:
        settings = yaml.safe_load(content["xp.cfg"])
    except (yaml.YAMLError, AttributeError) as error:
        raise ModelFormatError(f"{path}: xp.cfg is not YAML ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise ModelFormatError(f"{path}: xp.cfg holds no settings")
    return settings, weights


def load_text_encoder(folder: Path) -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
    """Return T5's tokenizer and encoder, in the float type of its files.

    The decoder of a whole T5 is left out. Raises `ModelFormatError` for another model, and unless every key
    of the encoder is there.
    """
    tokenizer, config = load_text_config(folder)
    try:
        encoder, found = T5EncoderModel.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # any exception of the library means that the folder is invalid
        raise ModelFormatError(f"text encoder: {folder} can't be loaded: {cause(folder, error)}") from error
    unknown = [key for key in found["unexpected_keys"] if not key.startswith(("decoder.", "lm_head."))]
    report_faults(
        str(folder), [("missing keys", sorted(found["missing_keys"])), ("unknown keys", sorted(unknown))]
    )
    check_finite(str(folder), encoder.state_dict())
    return tokenizer, encoder


# ---------------------------------------------------------------------------------------- the language model


def build_language_model(
    settings: Mapping[str, Any], weights: Weights
) -> tuple[MusicgenForCausalLM, TextProjection]:
    """Return the language model and the projection of its text.

    Sizes are read from the weights, except the number of heads. Raises `ModelFormatError` unless every key
    matches and every setting is known.
    """
    own = _section(LM, settings, "transformer_lm")
    faults = _unknown_settings(own, _LM_SETTINGS)
    pattern = _section(LM, settings, "codebooks_pattern")
    delays = (pattern.get("delay") or {}).get("delays")
    codebooks = sum(bool(re.fullmatch(r"emb\.\d+\.weight", key)) for key in weights)
    if pattern.get("modeling") != "delay" or delays not in (None, list(range(codebooks))):
        faults.append(f"codebooks_pattern is {pattern.get('modeling')!r} with delays {delays}")
    heads = own.get("num_heads")
    if not isinstance(heads, int) or heads < 1:
        faults.append(f"transformer_lm.num_heads is {heads!r}")
    report_faults(LM, [("unknown settings", faults)])
    needed = ("emb.0.weight", "transformer.layers.0.linear1.weight", _PROJECTION + "weight")
    report_faults(LM, [("missing keys", [key for key in needed if key not in weights])])
    rows, width = weights["emb.0.weight"].shape
    layers = {int(found[1]) for key in weights if (found := _LAYER.fullmatch(key))}
    config = MusicgenDecoderConfig(
        vocab_size=rows - 1,
        num_codebooks=codebooks,
        audio_channels=1,
        hidden_size=width,
        ffn_dim=weights["transformer.layers.0.linear1.weight"].shape[0],
        num_hidden_layers=1 + max(layers),
        num_attention_heads=heads,
        scale_embedding=False,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=rows - 1,
        bos_token_id=rows - 1,
        tie_word_embeddings=False,
    )
    projected = {
        key.removeprefix(_PROJECTION): weights[key] for key in weights if key.startswith(_PROJECTION)
    }
    text_width = weights[_PROJECTION + "weight"].shape[1]
    projection = assign_weights(
        f"{LM}: {_PROJECTION[:-1]}",
        on_meta(lambda: TextProjection(text_width, width)),
        {f"linear.{key}": tensor for key, tensor in projected.items()},
    )
    renamed: dict[str, Tensor] = {}
    for key in weights:
        if not key.startswith(_PROJECTION):
            renamed |= rename_language_model(key, weights[key])
    decoder = assign_weights(LM, on_meta(lambda: MusicgenForCausalLM(config)), renamed)
    positions = decoder.model.decoder.embed_positions
    positions.weights = positions.get_embedding(positions.num_positions, width)  # computed, in no file
    return decoder, projection


def rename_language_model(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor by transformers' key, or the three that upstream fused; an unknown key stays."""
    if found := re.fullmatch(r"emb\.(\d+)\.weight", key):
        return {f"model.decoder.embed_tokens.{found[1]}.weight": tensor}
    if found := re.fullmatch(r"linears\.(\d+)\.weight", key):
        return {f"lm_heads.{found[1]}.weight": tensor}
    if found := re.fullmatch(r"out_norm\.(weight|bias)", key):
        return {f"model.decoder.layer_norm.{found[1]}": tensor}
    if found := _LAYER.fullmatch(key):
        layer, rest = f"model.decoder.layers.{found[1]}", found[2]
        if (attention := _FUSED.get(rest)) and len(tensor) % 3 == 0:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            return {f"{layer}.{attention}.{part}_proj.weight": rows.clone() for part, rows in parts}
        for old, new in _RENAMES.items():
            if rest.startswith(old):
                return {f"{layer}.{new}{rest.removeprefix(old)}": tensor}
    return {key: tensor}


# ----------------------------------------------------------------------------------------------- the codec


def build_codec(settings: Mapping[str, Any], weights: Weights) -> EncodecModel:
    """Return EnCodec. Raises `ModelFormatError` unless every key matches and every setting is known."""
    seanet, rvq = _section(CODEC, settings, "seanet"), _section(CODEC, settings, "rvq")
    faults = _unknown_settings(seanet, _SEANET_SETTINGS)
    faults += _unknown_settings(settings, {"compression_model": ("encodec",), "channels": (1,)})
    autoencoder = settings.get("encodec") or {}
    renormalize = autoencoder.get("renormalize", False)
    if autoencoder.get("quantizer", "rvq") != "rvq" or renormalize not in (True, False):
        faults.append(f"encodec is {autoencoder}")
    needed = ("dimension", "n_filters", "ratios", "kernel_size", "residual_kernel_size", "last_kernel_size")
    faults += [f"seanet.{key} is missing" for key in needed if key not in seanet]
    faults += [f"rvq.{key} is missing" for key in ("n_q", "bins") if key not in rvq]
    rate = settings.get("sample_rate", autoencoder.get("sample_rate"))
    if not isinstance(rate, int):
        faults.append(f"sample_rate is {rate!r}")
    report_faults(CODEC, [("unknown settings", faults)])
    config = encodec_config(seanet, codebooks=rvq["n_q"], codebook_size=rvq["bins"], rate=rate)
    config.normalize = bool(renormalize)
    codec = EncodecModel(config)
    renamed = {rename_codec(key): tensor for key, tensor in weights.items()}
    check_weights(CODEC, codec, renamed)
    codec.load_state_dict(renamed)
    return codec


def encodec_config(
    seanet: Mapping[str, Any], *, codebooks: int, codebook_size: int, rate: int
) -> EncodecConfig:
    """Return transformers' config of upstream's ``seanet``, for so many codebooks.

    transformers has no field for their number: it follows from the bandwidth.
    """
    config = EncodecConfig(
        sampling_rate=rate,
        audio_channels=1,
        normalize=False,
        hidden_size=seanet["dimension"],
        num_filters=seanet["n_filters"],
        num_residual_layers=seanet.get("n_residual_layers", 1),
        upsampling_ratios=list(seanet["ratios"]),
        norm_type="weight_norm",
        kernel_size=seanet["kernel_size"],
        residual_kernel_size=seanet["residual_kernel_size"],
        last_kernel_size=seanet["last_kernel_size"],
        dilation_growth_rate=seanet.get("dilation_base", 2),
        use_causal_conv=seanet.get("causal", False),
        pad_mode=seanet.get("pad_mode", "constant"),
        compress=seanet.get("compress", 2),
        num_lstm_layers=seanet.get("lstm", 2),
        trim_right_ratio=(seanet.get("decoder") or {}).get("trim_right_ratio", 1.0),
        codebook_size=codebook_size,
        codebook_dim=seanet["dimension"],
        use_conv_shortcut=not seanet.get("true_skip", True),
    )
    config.target_bandwidths = [codebooks * config.frame_rate * config.codebook_nbits / 1000]
    assert config.num_quantizers == codebooks
    return config


def rename_codec(key: str) -> str:
    """Return transformers' key of upstream's; an unknown key stays."""
    if key.startswith("quantizer.vq.layers."):
        return key.replace("quantizer.vq.", "quantizer.", 1).replace("._codebook.", ".codebook.", 1)
    key = re.sub(r"^(encoder|decoder)\.model\.", r"\1.layers.", key)
    key = key.replace(".conv.conv.", ".conv.").replace(".convtr.convtr.", ".conv.")
    key = re.sub(r"\.weight_g$", ".parametrizations.weight.original0", key)
    return re.sub(r"\.weight_v$", ".parametrizations.weight.original1", key)


def _section(file: str, settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of the settings. Raises `ModelFormatError` if it is missing."""
    found = settings.get(name)
    if not isinstance(found, dict):
        raise ModelFormatError(f"{file}: xp.cfg has no section {name}; this is no checkpoint of AudioGen")
    return found


def _unknown_settings(own: Mapping[str, Any], known: Mapping[str, Sequence[Any]]) -> list[str]:
    return [
        f"{key} is {own[key]!r}" for key, values in known.items() if key in own and own[key] not in values
    ]
