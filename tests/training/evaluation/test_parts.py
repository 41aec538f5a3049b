"""Prompts, loudness, embedders and CNN14."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from services.audio.levels import is_silent
from services.errors import InvalidInputError, ModelFormatError, ModelNotFoundError
from services.models.mini.tagger import EventTagger
from services.models.state_dicts import on_meta
from tests.tiny import tiny_clap
from training.data.examples import FileClip
from training.evaluation import panns, passt
from training.evaluation.config import EvaluationConfig, WorldPrompts, label_of
from training.evaluation.embedders import AudioSetEmbedder, ClapEmbedder, Sound, TaggerEmbedder
from training.evaluation.events import is_clipped, loudness_db, overshoots
from training.evaluation.prompts import SPLITS, Prompt, read_prompts, world_prompts
from training.soundworld.scenes import split_of

LISTED = json.loads(Path(__file__).with_name("references.json").read_text())


def noise(seconds: float, rate: int = 16_000, seed: int = 0) -> Sound:
    samples = np.random.RandomState(seed).randn(round(seconds * rate)) * 0.1
    return Sound(samples.astype(np.float32), rate)


def test_csv_and_json_lines_give_the_same_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('caption,location\n"A dog barks, then a bell rings",a.wav\nRain,\n')
    rows = [
        {"caption": "A dog barks, then a bell rings", "location": "a.wav"},
        {"caption": "Rain"},
        {"caption": "Rain"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    csv, lines = (read_prompts(tmp_path / name) for name in ("a.csv", "a.jsonl"))
    assert csv == lines
    assert [prompt.text for prompt in csv] == ["A dog barks, then a bell rings", "Rain"]
    assert csv[0].reference == FileClip(path=tmp_path / "a.wav")
    assert csv[1].reference is None


def test_a_file_without_its_column_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sentence,sound\nRain,a.wav\n")
    with pytest.raises(
        InvalidInputError, match=r"has no column prompt, .*; it has sentence, sound"
    ) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)
    found = read_prompts(path, caption_column="sentence", reference_column="sound", audio_root=tmp_path / "b")
    assert found == (Prompt(text="Rain", reference=FileClip(path=tmp_path / "b" / "a.wav")),)
    with pytest.raises(InvalidInputError, match="has no column words"):
        read_prompts(path, caption_column="words")
    with pytest.raises(InvalidInputError, match="has no column clip"):
        read_prompts(path, caption_column="sentence", reference_column="clip")


def test_each_caption_of_a_clip_is_a_prompt_with_its_reference(tmp_path: Path) -> None:
    (tmp_path / "clotho.csv").write_text("file_name,caption_1,caption_2,caption_3\nx.wav,Rain,Birds,Rain\n")
    reference = FileClip(path=tmp_path / "x.wav")
    assert read_prompts(tmp_path / "clotho.csv") == tuple(
        Prompt(text=text, reference=reference) for text in ("Rain", "Birds")
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "holds no prompts"),
        ("a.csv", "caption\nRain\n \n", "a.csv:3: has no prompt"),
        ("a.csv", 'caption,audio\n"Rain,a.wav\nBirds,b.wav\n', "a.csv:2: has a quote that is not closed"),
        ("a.csv", "caption\nRa\0in\n", r"a.csv:2: prompt has the control character U\+0000"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: must be an object"),
        ("a.jsonl", "rain\n", "a.jsonl:1: is no JSON: Expecting value"),
        ("b.jsonl", None, "can't be read: No such file"),
    ],
)
def test_invalid_files_of_prompts_are_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "temporal", "multiple"),
    [
        ("A dog barks", False, False),
        ("A dog barks after a bell rings", True, True),
        ("Thereafter silence", False, False),
        ("A dog barks As rain falls", True, True),
        ("A man speaks with music", False, True),
        ("Rain, distant thunder", False, True),
    ],
)
def test_splits_of_prompts_by_their_words(text: str, temporal: bool, multiple: bool) -> None:
    prompt = Prompt(text=text)
    assert SPLITS["temporal"](prompt) is not SPLITS["non-temporal"](prompt)
    assert (SPLITS["temporal"](prompt), SPLITS["multiple concepts"](prompt)) == (temporal, multiple)


def test_the_worlds_prompts_are_held_out_distinct_and_have_a_truth() -> None:
    prompts = world_prompts(30, "test")
    assert len({prompt.text for prompt in prompts}) == 30
    assert {split_of(prompt.text) for prompt in prompts} == {"test"}
    assert prompts[:5] == world_prompts(5, "test")
    for prompt in prompts:
        assert prompt.truth is not None
        assert SPLITS["multiple concepts"](prompt) == (len(prompt.truth.classes) > 1)
    assert prompts[0].reference is not None
    waveform, rate = prompts[0].reference.read()
    assert waveform.shape[-1] / rate == pytest.approx(2.56)


def test_silence_and_clipping() -> None:
    silent, sound = np.full(100, 0.009, dtype=np.float32), np.full(100, 0.1, dtype=np.float32)
    assert is_silent(silent)
    assert not is_silent(sound)
    assert is_silent(sound[:0])
    sound[:1] = 1.0
    assert not is_clipped(sound)
    sound[:2] = -1.0
    assert is_clipped(sound)
    turned_down = np.array([0.5, -1.0, 0.5], dtype=np.float32)
    assert overshoots(turned_down) and not is_clipped(turned_down)
    assert not overshoots(turned_down * np.float32(0.99))
    assert loudness_db(np.full(10, 0.1, dtype=np.float32)) == pytest.approx(-20.0, abs=1e-4)
    assert loudness_db(np.zeros(10, dtype=np.float32)) == -100.0


def test_invalid_settings_are_refused() -> None:
    for wrong in (
        {"embedders": ("vggish:here",)},
        {"embedders": ("tagger:mini:tagger", "tagger:file:other/tagger")},
        {"scorers": ("mini:clap-a",)},
        {"seeds": 0},
    ):
        with pytest.raises(ValueError):
            EvaluationConfig(**wrong)
    with pytest.raises(ValueError, match="count is 0"):
        WorldPrompts(count=0)
    embedders = ("clap:laion:a/630k-best.pt", "panns:x.pth", "passt:y.pt", "tagger:mini:tagger")
    assert list(map(label_of, embedders)) == ["630k-best", "panns", "passt", "tagger"]


def test_embedders_take_clips_of_different_lengths_and_rates_in_order() -> None:
    torch.manual_seed(0)
    tagger = EventTagger(classes=["dog", "bell", "rain"], width=8, hidden=8).eval().requires_grad_(False)
    clips = [noise(0.5), noise(1.0, seed=1), noise(0.5, 8_000, seed=2), noise(0.5, seed=3)]
    for embedder, width in ((TaggerEmbedder(tagger, "d"), 16), (ClapEmbedder(tiny_clap(), "d"), 16)):
        together = embedder.embed(clips)
        assert together.embeddings_BD.shape == (4, width)
        alone = [embedder.embed([clip]) for clip in clips]
        np.testing.assert_allclose(
            together.embeddings_BD, np.concatenate([one.embeddings_BD for one in alone]), atol=1e-5
        )
    output = TaggerEmbedder(tagger, "d").embed(clips)
    assert output.logits_BK is not None
    assert output.logits_BK.shape == (4, 3)
    expected = tagger(torch.from_numpy(clips[0].waveform_N)[None]).amax(1)
    np.testing.assert_allclose(output.logits_BK[:1], expected.numpy(), atol=1e-5)
    assert len(TaggerEmbedder(tagger, "d").detect(clips)) == 4


def test_cnn14_has_the_names_and_shapes_of_panns_inferences() -> None:
    model = on_meta(lambda: panns.Cnn14(panns.VARIANTS[257]))
    own = {key: "x".join(map(str, tensor.shape)) for key, tensor in model.state_dict().items()}
    assert own == LISTED["cnn14 keys at 16 kHz"]


def test_cnn14_gave_the_same_output_as_panns_inference() -> None:
    """Recorded with random weights at full size: equal bit for bit."""
    differences = {name: value for name, value in LISTED["cnn14"].items() if "apart" not in name}
    assert len(differences) == 6
    assert max(differences.values()) == 0.0
    assert min(value for name, value in LISTED["cnn14"].items() if "apart" in name) > 1e-3


def _fourier_bases(variant: panns.Variant) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the real and imaginary bases [F, 1, n_fft] of a checkpoint: torchlibrosa's, Hann window."""
    samples = np.arange(variant.n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * samples / variant.n_fft)
    angles = 2 * np.pi * np.outer(np.arange(variant.n_fft // 2 + 1), samples) / variant.n_fft
    real, imaginary = (torch.from_numpy(wave(angles) * window).float() for wave in (np.cos, np.sin))
    return real[:, None], -imaginary[:, None]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in the format of the released files, a hundredth as wide."""
    monkeypatch.setattr(panns, "CHANNELS", (4, 4, 4, 4, 4, 8))
    monkeypatch.setattr(panns, "DIMENSION", 12)
    torch.manual_seed(0)
    variant = panns.VARIANTS[257]
    model = panns.Cnn14(variant)
    state = model.state_dict()
    real, imaginary = _fourier_bases(variant)
    state["logmel_extractor.melW"] = panns.mel_filters(variant)
    state["spectrogram_extractor.stft.conv_real.weight"] = real
    state["spectrogram_extractor.stft.conv_imag.weight"] = imaginary
    path = tmp_path / "Cnn14_16k.pth"
    torch.save({"iteration": 3, "model": state}, path)
    return path


def test_cnn14s_spectrogram_is_that_of_a_fourier_transform(checkpoint: Path) -> None:
    model = panns.load_panns(checkpoint)
    waveform = torch.from_numpy(noise(0.5).waveform_N)[None]
    power = model.spectrogram_extractor(waveform)
    expected = torch.stft(
        waveform,
        512,
        160,
        window=torch.hann_window(512),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    torch.testing.assert_close(power, expected.abs().square(), atol=1e-3, rtol=1e-3)


def test_a_panns_checkpoint_embeds_and_tags(checkpoint: Path) -> None:
    embedder = AudioSetEmbedder(panns.load_panns(checkpoint), "d")
    clips = [noise(0.1), noise(1.0, 32_000, seed=1)]  # the first is shorter than the pooling needs
    output = embedder.embed(clips)
    assert output.embeddings_BD.shape == (2, 12)
    assert output.logits_BK is not None
    assert output.logits_BK.shape == (2, 527)
    assert np.isfinite(output.embeddings_BD).all()


def test_invalid_panns_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    whole = torch.load(checkpoint, weights_only=True)

    def refused(content: object, message: str) -> None:
        path = tmp_path / "wrong.pth"
        torch.save(content, path)
        with pytest.raises(ModelFormatError, match=message) as caught:
            panns.load_panns(path)
        assert "\n" not in str(caught.value)

    state = whole["model"]
    refused({"model": {**state, "extra": torch.zeros(1)}}, "unknown keys: extra")
    refused({"model": {k: v for k, v in state.items() if k != "fc1.bias"}}, "missing keys: fc1.bias")
    refused({"model": {**state, "fc1.bias": torch.zeros(3)}}, r"fc1.bias is \[3\], not \[12\]")
    refused({"model": {**state, "logmel_extractor.melW": torch.zeros(257, 64)}}, "mel filters are not those")
    refused({"model": {}}, "has no mel filters")
    refused([1], "no tensors under `model`")
    refused({"model": Path("x")}, "holds pathlib.+, which could run code")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5_000])
    with pytest.raises(ModelFormatError, match="truncated"):
        panns.load_panns(checkpoint)
    with pytest.raises(ModelNotFoundError, match="PANNs checkpoint"):
        panns.load_panns(tmp_path / "none.pth")


def test_passt_has_the_names_and_shapes_of_hear21passts() -> None:
    model = on_meta(lambda: passt.Passt(width=768, depth=12, classes=527, rows=12, columns=99))
    own = {key: "x".join(map(str, tensor.shape)) for key, tensor in model.state_dict().items()}
    assert own == LISTED["passt keys"]


def test_passt_gave_the_same_output_as_hear21passt() -> None:
    """Recorded with random weights at full size."""
    differences = [value for name, value in LISTED["passt"].items() if "apart" not in name]
    assert len(differences) == 8
    assert max(differences) < 1e-6
    assert min(value for name, value in LISTED["passt"].items() if "apart" in name) > 0.5


@pytest.fixture
def passt_state() -> dict[str, torch.Tensor]:
    """The weights of a narrow PaSST of one block, in the format of the released files."""
    torch.manual_seed(0)
    model = passt.Passt(width=64, depth=1, classes=5, rows=12, columns=99)
    return {name: 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def test_a_passt_checkpoint_embeds_and_tags(passt_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "passt.pt"
    torch.save(passt_state, path)
    embedder = AudioSetEmbedder(passt.load_passt(path), "d")
    # Shorter than a patch, of another rate, and longer than the positions.
    clips = [noise(0.05), noise(1.0, 44_100, seed=1), noise(20.4, 32_000, seed=2)]
    output = embedder.embed(clips)
    assert output.embeddings_BD.shape == (3, 64)
    assert output.logits_BK is not None
    assert output.logits_BK.shape == (3, 5)
    assert np.isfinite(output.logits_BK).all()
    halves = embedder.embed([Sound(half, 32_000) for half in np.array_split(clips[2].waveform_N, 3)])
    np.testing.assert_allclose(output.embeddings_BD[2], halves.embeddings_BD.mean(0), atol=1e-5)


def test_invalid_passt_checkpoints_are_refused(passt_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "wrong.pt"

    def refused(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ModelFormatError, match=message) as caught:
            passt.load_passt(path)
        assert "\n" not in str(caught.value)

    refused({**passt_state, "extra": torch.zeros(1)}, "unknown keys: extra")
    refused({k: v for k, v in passt_state.items() if k != "norm.bias"}, "missing keys: norm.bias")
    refused({**passt_state, "time_new_pos_embed": torch.zeros(1, 64, 1, 199)}, "its spectrogram is another")
    refused({**passt_state, "norm.bias": torch.full((64,), torch.nan)}, "norm.bias")
    refused({}, "no positions in frequency and time")
    refused([1], "must map names to tensors")
    refused({"model": Path("x")}, "holds pathlib.+, which could run code")
    with pytest.raises(ModelNotFoundError, match="PaSST checkpoint"):
        passt.load_passt(tmp_path / "none.pt")
