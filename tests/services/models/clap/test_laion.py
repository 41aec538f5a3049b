"""LAION's checkpoints: every key accounted for, the same embeddings, and nothing of a pickle executed.

The checkpoints here are small: a random model of transformers under LAION's names. That those names mean
what laion_clap means by them is what ``make parity`` shows, at the real size.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from services.errors import InvalidInputError, ModelError, ModelFormatError, ModelNotFoundError
from services.models.clap import laion as clap_laion
from services.models.clap.laion import laion_config, load_laion
from services.models.clap.laion_package import load_laion_clap
from services.models.clap.model import QUANTISE, ClapModel
from tests.tiny import tiny_clap_tokenizer

State = dict[str, Tensor]

INVERSE = (
    (r"^text_model\.", "text_branch."),
    (r"^audio_model\.audio_encoder\.", "audio_branch."),
    (r"_projection\.linear1\.", "_projection.0."),
    (r"_projection\.linear2\.", "_projection.2."),
    (r"\.batch_norm\.", ".bn0."),
    (r"^(audio_.*)\.attention\.output\.dense\.", r"\1.attn.proj."),
    (r"^(audio_.*)\.attention\.self\.", r"\1.attn."),
    (r"^(audio_.*\.blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(audio_.*\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
"""transformers' names and LAION's, written down independently of `clap_laion`."""


def small_model(*, fused: bool = False) -> transformers.ClapModel:
    """Random weights of HTS-AT's and RoBERTa's form, at a width of 16."""
    config = transformers.ClapConfig(
        text_config={
            "vocab_size": len(tiny_clap_tokenizer()),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "intermediate_size": 24,
            "max_position_embeddings": 40,
            "layer_norm_eps": 1e-5,
        },
        audio_config={
            "patch_embeds_hidden_size": 16,
            "depths": [1, 2],
            "num_hidden_layers": 2,
            "num_attention_heads": [2, 4],
            "window_size": 4,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "enable_fusion": fused,
            "fusion_type": "aff_2d" if fused else None,
        },
        projection_dim=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.ClapModel(config).eval()


def laion_state(model: transformers.ClapModel) -> State:
    """The weights of `model` as laion_clap saves them, with what it saves besides."""
    state: State = {}
    for name, tensor in model.state_dict().items():
        key = name
        for pattern, replacement in INVERSE:
            key = re.sub(pattern, replacement, key)
        state[key] = tensor
    for key in [key for key in state if ".attn.query." in key]:
        parts = [state.pop(key.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        state[key.replace(".query.", ".qkv.")] = torch.cat(parts)
    extractor = transformers.ClapFeatureExtractor(frequency_min=50, frequency_max=14_000)
    state |= {
        "audio_branch.layers.1.blocks.1.attn_mask": torch.zeros(4, 16, 16),
        "audio_branch.spectrogram_extractor.stft.conv_real.weight": torch.zeros(513, 1, 1024),
        "audio_branch.spectrogram_extractor.stft.conv_imag.weight": torch.zeros(513, 1, 1024),
        "audio_branch.logmel_extractor.melW": torch.from_numpy(extractor.mel_filters_slaney).float(),
        "audio_branch.tscam_conv.weight": torch.zeros(5, 32, 2, 3),
        "audio_branch.tscam_conv.bias": torch.zeros(5),
        "audio_branch.head.weight": torch.zeros(5, 5),
        "audio_branch.head.bias": torch.zeros(5),
    }
    for side in ("text", "audio"):
        state |= {f"{side}_transform.sequential.{layer}.weight": torch.zeros(12, 12) for layer in (0, 3)}
        state |= {f"{side}_transform.sequential.{layer}.bias": torch.zeros(12) for layer in (0, 3)}
    return state


def checkpoint(state: State) -> dict[str, Any]:
    """What a training writes: parallel names, and an optimizer with numpy's numbers."""
    optimizer = {"param_groups": [{"lr": np.float64(1e-4)}], "state": {0: {"step": np.arange(2)}}}
    prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
    return {"epoch": 45, "name": "a run", "state_dict": prefixed, "optimizer": optimizer}


@pytest.fixture(scope="module")
def state() -> State:
    return laion_state(small_model())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a tokenizer in ``roberta-base``, and nothing else."""
    tiny_clap_tokenizer().save_pretrained(tmp_path / "roberta-base")
    return tmp_path


def noise(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    draw = np.random.default_rng(seed)
    return draw.uniform(-0.5, 0.5, round(seconds * 48_000)).astype(np.float32)


@torch.no_grad()
def assert_same(found: ClapModel, model: transformers.ClapModel) -> None:
    """Text and audio embeddings of `found` are those of `model` with transformers' own features."""
    tokens = tiny_clap_tokenizer()(["a dog barks", "rain"], padding=True, return_tensors="pt")
    text = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(found.embed_text(["a dog barks", "rain"]), text, rtol=0, atol=1e-5)
    fused = model.config.audio_config.enable_fusion
    extractor = transformers.ClapFeatureExtractor(
        frequency_min=50, frequency_max=14_000, truncation="fusion" if fused else "rand_trunc"
    )
    for seed, seconds in enumerate((0.7, 10.0)):
        waveform = noise(seconds, seed)
        rounded = (waveform * 32_767).astype(np.int16) / 32_767
        features = extractor(rounded, sampling_rate=48_000, return_tensors="pt")["input_features"].float()
        audio = model.get_audio_features(input_features=features, is_longer=torch.tensor([[False]]))
        torch.testing.assert_close(
            found.embed_audio([waveform], 48_000), audio.pooler_output, rtol=0, atol=1e-5
        )


def test_checkpoint_gives_its_models_embeddings(state: State, folder: Path) -> None:
    path = folder / "630k.pt"
    torch.save(checkpoint(state), path)
    found = load_laion(path)
    assert_same(found, small_model())
    assert (found.sampling_rate, found.window_samples, found.dimension) == (48_000, 480_000, 12)
    assert found.extractor.padding == "repeatpad" and getattr(found.extractor, QUANTISE) is True
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())
    # The model holds copies: a checkpoint that is replaced while it is served changes nothing.
    path.write_bytes(b"")
    assert_same(found, small_model())


def _bare(state: State) -> Any:
    return state


def _nested_without_prefix(state: State) -> Any:
    return {"state_dict": state}


def _without_extras(state: State) -> Any:
    dropped = re.compile("|".join(clap_laion.DROPPED))
    return {key: tensor for key, tensor in state.items() if not dropped.fullmatch(key)}


@pytest.mark.parametrize("form", [_bare, _nested_without_prefix, _without_extras])
def test_other_forms_of_a_checkpoint(state: State, folder: Path, form: Callable[[State], Any]) -> None:
    torch.save(form(dict(state)), folder / "model.pt")
    assert_same(load_laion(folder / "model.pt"), small_model())


def test_old_format_and_half_precision(state: State, folder: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    half["audio_branch.logmel_extractor.melW"] = state["audio_branch.logmel_extractor.melW"]
    torch.save(half, folder / "old.pt", _use_new_zipfile_serialization=False)
    found = load_laion(folder / "old.pt")
    assert found.clap.dtype == torch.float32
    wanted = small_model().half().float()
    assert torch.equal(found.clap.state_dict()["logit_scale_a"], wanted.state_dict()["logit_scale_a"])


def test_fused_checkpoint(folder: Path) -> None:
    model = small_model(fused=True)
    torch.save(checkpoint(laion_state(model)), folder / "fused.pt")
    found = load_laion(folder / "fused.pt")
    assert found.clap.config.audio_config.fusion_type == "aff_2d" and found.extractor.truncation == "fusion"
    assert_same(found, model)


def test_saved_as_a_folder_it_stays_the_same(state: State, folder: Path) -> None:
    from services.models.clap.loading import load_clap

    torch.save(state, folder / "model.pt")
    model = load_laion(folder / "model.pt")
    model.save(folder / "hf")
    assert_same(load_clap(folder / "hf"), small_model())


@pytest.mark.parametrize(
    ("name", "width", "depths", "hidden"),
    [("HTSAT-tiny", 96, (2, 2, 6, 2), 768), ("HTSAT-base", 128, (2, 2, 12, 2), 1024)],
)
def test_architectures_are_told_by_their_shapes(
    name: str, width: int, depths: tuple[int, ...], hidden: int
) -> None:
    with torch.device("meta"):
        config = transformers.ClapConfig(
            text_config={"layer_norm_eps": 1e-5},
            audio_config={"patch_embeds_hidden_size": width, "depths": depths, "hidden_size": hidden},
        )
        model = transformers.ClapModel(config)
        state = laion_state(model)
    found = laion_config(name, state)
    assert clap_laion.architecture(name, found) == name
    assert (tuple(found.audio_config.depths), found.audio_config.hidden_size) == (depths, hidden)
    for side in ("text_config", "audio_config"):
        for field in ("num_attention_heads", "window_size", "mlp_ratio", "vocab_size", "intermediate_size"):
            first, second = (getattr(getattr(each, side), field, None) for each in (found, config))
            assert (list(first) if isinstance(first, list | tuple) else first) == (
                list(second) if isinstance(second, list | tuple) else second
            )
    assert found.text_config.layer_norm_eps == 1e-5 and found.text_config.max_position_embeddings == 514
    counters = ("position_ids", "token_type_ids", "relative_position_index")
    weights = {key: t for key, t in model.state_dict().items() if not key.endswith(counters)}
    converted = clap_laion.convert_state(state)
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in weights.items()}


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(ModelFormatError, match=r"width 16 and depths \(1, 2\) is unknown to laion_clap"):
        clap_laion.architecture("x.pt", small_model().config)


def test_window_positions_are_transformers_own() -> None:
    attention = small_model().audio_model.audio_encoder.layers[0].blocks[0].attention.self
    assert torch.equal(clap_laion.relative_positions(4), attention.relative_position_index)


# --------------------------------------------------------------------------------------------------- refused


def _drop_and_add(state: State) -> None:
    del state["text_branch.encoder.layer.1.output.dense.bias"], state["audio_projection.0.weight"]
    state["audio_branch.layers.0.blocks.0.gate"] = torch.zeros(1)
    state["extra.bias"] = torch.zeros(1)
    state["logit_scale_a"] = torch.zeros(2)


def _put(name: str, *shape: int) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[f"audio_branch.{name}"] = torch.zeros(*shape)

    return change


def _cast(name: str, dtype: torch.dtype) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = state[name].to(dtype)

    return change


def _other_filters(state: State) -> None:
    filters = transformers.ClapFeatureExtractor(frequency_min=0, frequency_max=14_000).mel_filters_slaney
    state["audio_branch.logmel_extractor.melW"] = torch.from_numpy(filters).float()


def _rename_audio(state: State) -> None:
    for key in [key for key in state if key.startswith("audio_branch.")]:
        state[key.replace("audio_branch.", "audio.")] = state.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _drop_and_add,
            "2 missing keys: text_model.encoder.layer.1.output.dense.bias, audio_projection.linear1.weight; "
            "2 unknown keys: audio_model.audio_encoder.layers.0.blocks.0.gate, extra.bias; "
            "1 wrong shapes: logit_scale_a is [2], not []",
        ),
        (lambda state: state.pop("text_branch.embeddings.word_embeddings.weight"), "1 missing keys"),
        (lambda state: state.pop("audio_branch.layers.0.blocks.0.attn.qkv.weight"), "3 missing keys"),
        (_put("layers.0.blocks.0.attn.qkv.bias", 47), "3 missing keys"),
        (_put("layers.5.blocks.0.norm1.bias", 16), "missing keys"),
        (
            _put("patch_embed.proj.weight", 7, 1, 4, 4),
            "size (7) is not a multiple of the number of attention",
        ),
        (_put("bn0.weight", 0), "these sizes are no CLAP model's"),
        (
            _put("patch_embed.proj.weight", 16, 4, 4, 4),
            "fusion type is channel_map, but only aff_2d",
        ),
        (_put("patch_embed.fusion_model.local_att2.0.bias", 4), "type is iaff_2d"),
        (_put("patch_embed.mel_conv2d.weight", 16, 1, 4, 12), "type is daf_2d"),
        (_put("mel_conv1d.0.weight", 64, 64, 5), "type is 1d"),
        (_put("conv_block1.conv1.weight", 4, 1, 3, 3), "audio encoder is PANN"),
        (
            _cast("text_projection.0.weight", torch.int32),
            "text_projection.linear1.weight has int32, not floats",
        ),
        (_cast("logit_scale_a", torch.complex64), "logit_scale_a has complex64, not floats"),
        (_put("logmel_extractor.melW", 257, 64), "melW is [257, 64], not [513, 64]"),
        (_other_filters, "from mel filters of 50 to 14000 Hz"),
        (_rename_audio, "no keys that begin with text_branch. and audio_branch."),
        (lambda state: state.clear(), "is no LAION checkpoint"),
    ],
)
def test_other_weights_are_refused(
    state: State, folder: Path, damage: Callable[[State], object], message: str
) -> None:
    changed = dict(state)
    damage(changed)
    torch.save(checkpoint(changed), folder / "model.pt")
    with pytest.raises(ModelFormatError) as caught:
        load_laion(folder / "model.pt")
    assert message in str(caught.value) and "\n" not in str(caught.value)


class Hostile:
    """A pickle that makes a folder when it is read carelessly."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("newest", [True, False])
def test_pickle_that_runs_code_is_refused(state: State, folder: Path, newest: bool) -> None:
    path = folder / "model.pt"
    data = {**checkpoint(state), "args": Hostile(folder / "made")}
    torch.save(data, path, _use_new_zipfile_serialization=newest)
    with pytest.raises(ModelFormatError, match=r"holds posix\.mkdir, which could run code") as caught:
        load_laion(path)
    assert "\n" not in str(caught.value) and not (folder / "made").exists()


@pytest.mark.parametrize("content", ["truncated", "text", "empty", "number", "list"])
def test_file_that_is_no_checkpoint_is_refused(state: State, folder: Path, content: str) -> None:
    path = folder / "model.pt"
    if content == "truncated":
        torch.save(checkpoint(state), path)
        path.write_bytes(path.read_bytes()[:-5_000])
    elif content in ("text", "empty"):
        path.write_text("not weights" if content == "text" else "")
    else:
        torch.save({"state_dict": 5} if content == "number" else [torch.zeros(1)], path)
    with pytest.raises(ModelFormatError, match=r"truncated|an empty file|no state_dict of tensors") as caught:
        load_laion(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_wrong_device(state: State, folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a file; give the path of a LAION checkpoint"):
        load_laion(folder / "nothing.pt")
    with pytest.raises(ModelNotFoundError, match="is not a file"):
        load_laion(folder)
    torch.save(state, folder / "model.pt")
    with pytest.raises(InvalidInputError, match="'toaster' can't be used"):
        load_laion(folder / "model.pt", device="toaster")


# ------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache and no network."""

    def unreachable(name: str, **_: object) -> str:
        raise OSError(f"{name}: no network\nand much advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


@pytest.mark.usefixtures("no_hub")
def test_tokenizer_is_found_where_it_lies(state: State, folder: Path) -> None:
    path = folder / "weights" / "model.pt"
    path.parent.mkdir()
    torch.save(state, path)
    with pytest.raises(ModelNotFoundError) as caught:
        load_laion(path)
    wanted = "no network); put the tokenizer's files of FacebookAI/roberta-base into "
    assert f"{wanted}{path.parent / 'roberta-base'}" in str(caught.value) and "\n" not in str(caught.value)
    given = load_laion(path, tokenizer=folder / "roberta-base")
    for file in (folder / "roberta-base").iterdir():
        shutil.copy(file, path.parent)
    neighbour = load_laion(path)
    assert torch.equal(given.embed_text(["a dog"]), neighbour.embed_text(["a dog"]))


def test_tokenizer_of_the_hubs_cache(state: State, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def cached(name: str, *, local_files_only: bool, allow_patterns: list[str]) -> str:
        asked.append((name, local_files_only))
        assert not any("safetensors" in pattern or "bin" in pattern for pattern in allow_patterns)
        if name != "roberta-base":
            raise OSError("not there")
        return str(folder / "elsewhere")

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    (folder / "roberta-base").rename(folder / "elsewhere")
    torch.save(state, folder / "model.pt")
    assert_same(load_laion(folder / "model.pt"), small_model())
    assert asked == [("FacebookAI/roberta-base", True), ("roberta-base", True)]


def test_wrong_tokenizers_are_refused(state: State, folder: Path) -> None:
    torch.save(state, folder / "model.pt")
    with pytest.raises(ModelNotFoundError, match="is not a folder; give the folder of the text encoder's"):
        load_laion(folder / "model.pt", tokenizer=folder / "nowhere")
    tokenizer = folder / "roberta-base"
    words = {word: index for index, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(tokenizer / "tokenizer.json"))
    with pytest.raises(ModelFormatError, match="its tokenizer has 5 tokens, but the text encoder has 26"):
        load_laion(folder / "model.pt")
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    with pytest.raises(ModelFormatError, match="tokenizer"):
        load_laion(folder / "model.pt")
    other = tiny_clap_tokenizer()
    other.pad_token = "<unk>"
    other.save_pretrained(tokenizer)
    with pytest.raises(ModelFormatError, match="padding token is 3, but RoBERTa's is 1"):
        load_laion(folder / "model.pt")


# --------------------------------------------------------------------------------------------------- backend


def test_backend_says_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = transformers.ClapModel(transformers.ClapConfig())
    tokenizer = tiny_clap_tokenizer()
    monkeypatch.setattr("services.models.clap.laion_package.find_spec", lambda _: None)
    monkeypatch.setattr("services.models.clap.laion_package.read_state", lambda _: laion_state(model))
    monkeypatch.setattr("services.models.clap.laion_package.load_text_tokenizer", lambda *_: tokenizer)
    with pytest.raises(
        ModelError, match=r"separate environment: pip install \"milonga\[serving,laion-clap\]\""
    ) as caught:
        load_laion_clap(folder / "model.pt")
    assert "\n" not in str(caught.value)
