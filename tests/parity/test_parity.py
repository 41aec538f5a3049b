"""`load_laion` and `LaionClap` against laion_clap itself: the same weights, the same embeddings.

Shape legend: B batch, W windows, S samples of a window, D embedding width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor

from services.errors import ModelError
from services.models.clap.laion import load_laion
from services.models.clap.laion_package import POSITIONS, LaionClap, load_laion_clap, make_laion_clap
from services.models.clap.model import QUANTISE, ClapModel
from tests.parity.conftest import MEASURED

TOLERANCE = 1e-5
"""Largest absolute difference of two normalised embeddings of 512 numbers."""

PROMPTS = (
    "A dog barks",
    "Rain falls on a tin roof while thunder rolls far away",
    "bell",
    "a siren wails then " * 40,  # longer than the 77 tokens that are read
)

SECONDS = (0.1, 0.37, 1.0, 2.5, 3.3333, 5.0, 7.77, 9.9999, 10.0)
"""Clip lengths: short, whole parts of a window and not, one sample short of it, equal to it."""

WORDS = sorted({word for prompt in PROMPTS for word in prompt.lower().split()})


@dataclass(frozen=True)
class Pair:
    """One checkpoint in laion_clap's own module, in `load_laion`'s and in `LaionClap`."""

    name: str
    path: Path
    upstream: Any
    ours: ClapModel
    record: Callable[[str, float], None]

    @property
    def fused(self) -> bool:
        return bool(self.upstream.enable_fusion)

    def check(self, compared: str, first: Tensor, second: Tensor, tolerance: float = TOLERANCE) -> None:
        """Keep the largest difference for the report, and fail if it is above `tolerance`."""
        assert first.shape == second.shape and first.dtype == second.dtype == torch.float32
        difference = float((first - second).abs().max())
        self.record(compared, difference)
        assert difference <= tolerance


def write_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer with RoBERTa's special tokens and 50,265 entries, whole words."""
    special = ("<s>", "<pad>", "</s>", "<unk>")
    fill = tuple(f"word{index}" for index in range(50_265 - 1 - len(special) - len(WORDS)))
    entries = {word: index for index, word in enumerate((*special, *WORDS, *fill, "<mask>"))}
    tokenizer = Tokenizer(WordLevel(entries, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
    made.save_pretrained(folder)
    return made


def config_of(name: str, *, fused: bool) -> transformers.ClapConfig:
    """What `make_laion_clap` is told: only the sizes count."""
    base = name == "HTSAT-base"
    return transformers.ClapConfig(
        text_config={"layer_norm_eps": 1e-5},
        audio_config={
            "patch_embeds_hidden_size": 128 if base else 96,
            "depths": [2, 2, 12, 2] if base else [2, 2, 6, 2],
            "enable_fusion": fused,
        },
    )


@torch.no_grad()
def enliven(module: torch.nn.Module) -> None:
    """Weights that keep a signal's size, and other values where there is 0 or 1 before training.

    As made, a network hears little: two clips' embeddings are near 1e-2 apart, and any mistake is small.
    """
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or name.startswith("logit_scale"):
            continue
        if parameter.ndim < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embeddings" not in name:
            fan = parameter[0].numel() if "bias_table" not in name else 1
            parameter.copy_(torch.randn_like(parameter) / fan**0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn_like(buffer) * (5 if ".bn0." in name else 0.1))
            if ".bn0." in name:
                buffer.sub_(30)  # it hears decibels
        elif name.endswith("running_var"):
            buffer.copy_((0.5 + torch.rand_like(buffer)) * (200 if ".bn0." in name else 1))


@pytest.fixture(
    scope="module",
    params=[("HTSAT-tiny", False), ("HTSAT-base", False), ("HTSAT-tiny", True)],
    ids=["tiny", "base", "tiny-fused"],
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Random weights in laion_clap, saved in LAION's format, and loaded back."""
    name, fused = request.param
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("laion")
    tokenizer = write_tokenizer(folder / "roberta-base")
    with pytest.MonkeyPatch.context() as patch:
        if fused:  # torchaudio computes its spectrograms, which this environment lacks: its weights alone
            patch.setattr("services.models.clap.laion_package.find_spec", lambda _: True)
        upstream = make_laion_clap("random", config_of(name, fused=fused), tokenizer)
    enliven(upstream.model)
    state = {f"module.{key}": tensor for key, tensor in upstream.model.state_dict().items()}
    state[f"module.{POSITIONS}"] = torch.arange(514)[None]  # as in every published file
    optimizer = {"param_groups": [{"lr": np.float64(1e-4)}]}
    path = folder / "random.pt"
    torch.save({"epoch": 45, "name": "random", "state_dict": state, "optimizer": optimizer}, path)

    def record(compared: str, difference: float) -> None:
        label = f"{name}{', fused' if fused else ''}"
        request.config.stash[MEASURED].append((label, compared, difference))

    yield Pair(name=name, path=path, upstream=upstream, ours=load_laion(path), record=record)
    path.unlink()


def clip(seconds: float, seed: int = 0, rate: int = 48_000) -> NDArray[np.float32]:
    """Noise and two tones that change, within [-1, 1]."""
    count = round(seconds * rate)
    draw = np.random.default_rng(seed)
    time = np.arange(count) / rate
    tones = 0.3 * np.sin(2 * np.pi * (300 + 200 * seed) * time) + 0.2 * np.sin(2 * np.pi * 3_000 * time**1.5)
    return (tones + 0.1 * draw.standard_normal(count)).clip(-1, 1).astype(np.float32)


@torch.no_grad()
def heard(pair: Pair, waveform: NDArray[np.float32], *, quantised: bool) -> Tensor:
    """laion_clap's embedding [1, D] of a clip of 48 kHz, by its own front door."""
    if quantised:
        return torch.from_numpy(pair.upstream.get_audio_embedding_from_data(x=waveform[None]))
    tensor = torch.from_numpy(waveform)[None]
    embedding: Tensor = pair.upstream.get_audio_embedding_from_data(x=tensor, use_tensor=True)
    return embedding


def needs_spectrograms(pair: Pair) -> None:
    if pair.fused:
        pytest.skip("laion_clap computes a fused model's spectrograms by torchaudio, which is not installed")


@torch.no_grad()
def test_text(pair: Pair) -> None:
    found = pair.ours.embed_text(PROMPTS)
    wanted = pair.upstream.get_text_embedding(list(PROMPTS), use_tensor=True)
    pair.check("text", found, wanted)
    alone = torch.cat([pair.ours.text_features([prompt]) for prompt in PROMPTS])
    pair.check("text, one prompt at a time", alone, wanted)


def test_audio_of_floats(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_spectrograms(pair)
    monkeypatch.setattr(pair.ours.extractor, QUANTISE, False)
    for seed, seconds in enumerate(SECONDS):
        waveform = clip(seconds, seed)
        found = pair.ours.embed_audio([waveform], 48_000)
        pair.check(f"audio, floats, {seconds} s", found, heard(pair, waveform, quantised=False))


def test_audio_of_16_bits(pair: Pair) -> None:
    needs_spectrograms(pair)
    waveforms = [clip(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    wanted = torch.cat([heard(pair, waveform, quantised=True) for waveform in waveforms])
    pair.check("audio, rounded to 16 bits, all lengths", pair.ours.embed_audio(waveforms, 48_000), wanted)


def test_filters_of_fused_models(pair: Pair) -> None:
    """torchaudio's, which upstream says are librosa's in HTK's form."""
    if not pair.fused:
        pytest.skip("unfused models have Slaney's, which the decibels show")
    filters_MK = import_module("librosa").filters.mel(
        sr=48_000, n_fft=1024, n_mels=64, fmin=50, fmax=14_000, htk=True, norm=None
    )
    difference = float(np.abs(pair.ours.mel.filters.numpy().T - filters_MK).max())
    pair.record("mel filters against librosa's", difference)
    assert difference <= TOLERANCE


@torch.inference_mode()
def test_network_on_the_same_spectrogram(pair: Pair) -> None:
    """Also a fused model's other views, which clips longer than a window have."""
    windows_WS = torch.cat([pair.ours.prepare(clip(seconds, 1), 48_000) for seconds in (0.37, 3.3333, 10.0)])
    mel_W1TM = pair.ours.mel(windows_WS)
    if not pair.fused:
        wanted_W1TM = pair.upstream.model.audio_branch.logmel_extractor(
            pair.upstream.model.audio_branch.spectrogram_extractor(windows_WS)
        )
        pair.record("decibels of the spectrogram", float((mel_W1TM - wanted_W1TM).abs().max()))
        return
    for label, longer in (("global view", [False] * 3), ("fused views", [True, False, True])):
        views_W4TM = torch.cat([mel_W1TM.roll(shift, 2) for shift in (0, 1, 20, 300)], 1)
        wanted = pair.upstream.model.audio_projection(
            pair.upstream.model.encode_audio(
                {"longer": torch.tensor(longer)[:, None], "mel_fusion": views_W4TM}, device="cpu"
            )["embedding"]
        )
        found = pair.ours.clap.get_audio_features(
            input_features=views_W4TM, is_longer=torch.tensor(longer)[:, None]
        ).pooler_output
        pair.check(f"network, {label}", found, torch.nn.functional.normalize(wanted, dim=-1))


def test_backends_score_alike(pair: Pair) -> None:
    if pair.fused:
        with pytest.raises(
            ModelError, match=r"random\.pt is a fused model, for which laion_clap needs torchaudio"
        ):
            load_laion_clap(pair.path)
        return
    package = load_laion_clap(pair.path)
    assert isinstance(package, LaionClap)
    assert (package.sampling_rate, package.dimension) == (pair.ours.sampling_rate, pair.ours.dimension)
    assert package.window_count(25.0) == pair.ours.window_count(25.0) == 3
    stereo = np.stack([clip(25.0, 1, 44_100), clip(25.0, 2, 44_100)])
    scores = [
        (model.score(PROMPTS[:2], [stereo[0, :44_100], stereo], 44_100), model.embed_windows([windows]))
        for model in (package, pair.ours)
        for windows in [model.prepare(stereo, 44_100)]
    ]
    pair.check("backend: embedding of 25 s of stereo, 44.1 kHz", scores[0][1], scores[1][1])
    pair.check("backend: CLAP scores", scores[0][0], scores[1][0])
    assert package.cache.misses == 2 and package.device == torch.device("cpu")


def test_clips_and_prompts_are_told_apart(pair: Pair) -> None:
    """What the differences are to be compared with: embeddings that were all alike would always agree."""
    words = pair.ours.embed_text(PROMPTS[:2])
    difference = float((words[0] - words[1]).abs().max())
    pair.record("for scale: two prompts", difference)
    assert difference > 1_000 * TOLERANCE
    if not pair.fused:
        sounds = pair.ours.embed_audio([clip(2.5, 3), clip(2.5, 4)], 48_000)
        difference = float((sounds[0] - sounds[1]).abs().max())
        pair.record("for scale: two clips", difference)
        assert difference > 100 * TOLERANCE


def test_the_oracle_sees_wrong_settings(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parity that holds with everything would show nothing."""
    needs_spectrograms(pair)
    if pair.name != "HTSAT-tiny":
        pytest.skip("seen on one architecture")
    wanted = pair.upstream.get_text_embedding(list(PROMPTS), use_tensor=True)
    norms = [
        module for module in pair.ours.clap.text_model.modules() if isinstance(module, torch.nn.LayerNorm)
    ]
    for norm in norms:
        monkeypatch.setattr(norm, "eps", 1e-12)
    difference = float((pair.ours.text_features(PROMPTS) - wanted).abs().max())
    pair.record("wrong on purpose: layer_norm_eps 1e-12", difference)
    assert difference > TOLERANCE
    waveform = 0.003 * clip(3.3333, 4)
    quantised = heard(pair, waveform, quantised=True)
    monkeypatch.setattr(pair.ours.extractor, QUANTISE, False)
    difference = float((pair.ours.embed_audio([waveform], 48_000) - quantised).abs().max())
    pair.record("wrong on purpose: not rounded to 16 bits", difference)
    assert difference > TOLERANCE
