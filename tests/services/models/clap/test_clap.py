"""`ClapModel` and `load_clap`: what an embedding is, what a folder must hold."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from services.errors import InvalidInputError, ModelFormatError, ModelNotFoundError
from services.models.clap.loading import load_clap
from services.models.clap.model import PADDINGS, QUANTISE, ClapModel, Padding, TextCache
from tests.tiny import WORDS, tiny_clap

WEIGHTS = "model.safetensors"
Waveform = NDArray[np.float32]


def noise(seconds: float, rate: int = 16_000, seed: int = 0) -> Waveform:
    draw = np.random.default_rng(seed)
    return draw.uniform(-0.8, 0.8, round(seconds * rate)).astype(np.float32)


def tone(seconds: float, rate: int) -> Waveform:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def clap() -> ClapModel:
    return tiny_clap()


@pytest.fixture(scope="module")
def folder(clap: ClapModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder. Read only: tests that damage it copy it first."""
    target = tmp_path_factory.mktemp("clap") / "tiny"
    clap.text_features(["a dog", "a dog barks"])  # a tokenizer remembers how it last padded and cut
    clap.save(target)
    return target


# ------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize(
    ("seconds", "rate", "windows"),
    [
        *((0.1, 16_000, 1), (0.99, 16_000, 1), (1.0, 16_000, 1), (60.0, 16_000, 60)),
        *((1.5, 8_000, 2), (2.0, 44_100, 2), (0.5, 48_000, 1), (0.1, 192_000, 1)),
    ],
)
def test_clips_of_every_length_and_rate(clap: ClapModel, seconds: float, rate: int, windows: int) -> None:
    waveform = noise(seconds, rate)
    prepared = clap.prepare(waveform, rate)
    assert prepared.shape == (windows, 16_000) and prepared.dtype == torch.float32
    assert clap.window_count(seconds) == windows
    embedding = clap.embed_audio([waveform], rate)
    assert embedding.shape == (1, clap.dimension) and embedding.dtype == torch.float32
    assert embedding.device == torch.device("cpu")
    assert abs(float(embedding.norm()) - 1) < 1e-6
    assert torch.equal(clap.embed_audio([waveform], rate), embedding)


def test_sentences_have_normalised_embeddings(clap: ClapModel) -> None:
    embeddings = clap.embed_text(["A dog barks", "rain falls", "x" * 1_000, "a dog " * 200])
    assert embeddings.shape == (4, clap.dimension) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
    assert float((embeddings[0] - embeddings[1]).abs().max()) > 1e-3


def test_equal_channels_are_their_mono(clap: ClapModel) -> None:
    mono = noise(0.7)
    both = clap.embed_audio([np.stack([mono, mono])], 16_000)
    torch.testing.assert_close(both, clap.embed_audio([mono], 16_000), rtol=0, atol=1e-6)
    other = np.stack([mono, noise(0.7, seed=1)])
    assert torch.equal(clap.prepare(other, 16_000), clap.prepare(other[::-1], 16_000))


def test_one_sound_at_several_rates_is_one_embedding(clap: ClapModel) -> None:
    wanted = clap.embed_audio([tone(0.8, 16_000)], 16_000)
    for rate in (8_000, 44_100, 48_000):
        assert float((clap.embed_audio([tone(0.8, rate)], rate) * wanted).sum()) > 0.999


def test_windows_cover_a_long_clip_at_equal_distances(clap: ClapModel) -> None:
    waveform = noise(2.25)
    windows = clap.prepare(waveform, 16_000)
    for window, start in zip(windows, (0, 10_000, 20_000), strict=True):
        assert np.array_equal(window.numpy(), waveform[start : start + 16_000])
    each = clap.audio_features(windows)
    torch.testing.assert_close(each.norm(dim=-1), torch.ones(3))
    wanted = torch.nn.functional.normalize(each.mean(0, keepdim=True), dim=-1)
    torch.testing.assert_close(clap.embed_windows([windows]), wanted)


def test_short_clips_fill_a_window(clap: ClapModel) -> None:
    waveform = noise(0.3)  # three whole times and a third
    whole = np.concatenate([waveform] * 3)

    def filled(padding: Padding | None) -> Waveform:
        found: Waveform = clap.prepare(waveform, 16_000, padding=padding)[0].numpy()
        return found

    assert np.array_equal(filled("pad"), np.pad(waveform, (0, 11_200)))
    assert np.array_equal(filled("repeatpad"), np.pad(whole, (0, 1_600)))
    assert np.array_equal(filled("repeat"), np.concatenate([whole, waveform[:1_600]]))
    assert np.array_equal(filled(None), filled("repeatpad"))
    assert PADDINGS == ("repeatpad", "repeat", "pad")


def test_loud_samples_are_clipped_and_16_bits_are_cut_towards_zero(clap: ClapModel) -> None:
    assert float(clap.prepare(np.full(16_000, -3, np.float32), 16_000).min()) == -1
    samples = np.linspace(-1, 1, 16_000, dtype=np.float32)
    model = tiny_clap()
    setattr(model.extractor, QUANTISE, True)
    found = model.prepare(samples, 16_000)[0].numpy()
    assert np.array_equal(np.round(found * 32_767), np.trunc(samples * np.float32(32_767)))


def test_companions_change_nothing(clap: ClapModel) -> None:
    clips = [noise(seconds, seed=seed) for seed, seconds in enumerate((0.1, 1.0, 3.3, 0.6))]
    together = clap.embed_audio(clips, 16_000)
    alone = torch.cat([clap.embed_audio([clip], 16_000) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    prompts = ["a dog", "a bird sings then a bell rings and rain falls"]
    batch = clap.text_features(prompts)
    singly = torch.cat([clap.text_features([prompt]) for prompt in prompts])
    torch.testing.assert_close(batch, singly, rtol=0, atol=1e-5)


def test_score_is_the_cosine_of_each_pair(clap: ClapModel) -> None:
    prompts, clips = (
        ["a dog barks", "rain falls", "a bell rings"],
        [noise(0.5, seed=seed) for seed in range(3)],
    )
    scores = clap.score(prompts, clips, 16_000)
    assert scores.shape == (3,) and float(scores.abs().max()) <= 1
    matrix = clap.embed_text(prompts) @ clap.embed_audio(clips, 16_000).T
    torch.testing.assert_close(scores, matrix.diagonal())
    swapped = clap.score(prompts[::-1], clips[::-1], 16_000)
    torch.testing.assert_close(swapped, scores.flip(0), rtol=0, atol=1e-5)
    assert torch.equal(clap.score(prompts, clips, 16_000), scores)


def test_fused_model_embeds_windows(tmp_path: Path) -> None:
    model = tiny_clap(fused=True)
    embedding = model.embed_audio([noise(2.5)], 16_000)
    assert abs(float(embedding.norm()) - 1) < 1e-6
    model.save(tmp_path / "fused")
    assert torch.equal(load_clap(tmp_path / "fused").embed_audio([noise(2.5)], 16_000), embedding)


@pytest.mark.parametrize("fused", [False, True])
def test_spectrogram_is_the_feature_extractors(fused: bool) -> None:
    model = tiny_clap(fused=fused)
    clips = [noise(seconds, seed=seed) for seed, seconds in enumerate((0.1, 0.77, 1.0))]
    wanted = model.extractor(clips, sampling_rate=16_000, return_tensors="pt")["input_features"]
    windows = torch.cat([model.prepare(clip, 16_000) for clip in clips])
    torch.testing.assert_close(model.mel(windows), wanted[:, :1].float(), rtol=0, atol=1e-3)


def test_silence_is_finite(clap: ClapModel) -> None:
    assert float(clap.mel(torch.zeros(1, 16_000)).max()) == -100
    assert bool(clap.embed_audio([np.zeros(8_000, np.float32)], 16_000).isfinite().all())


# ---------------------------------------------------------------------------------------------------- tokens


def test_tokens_carry_their_times_and_masks(clap: ClapModel) -> None:
    clips = [noise(0.5), noise(2.5)]
    tokens = clap.audio_tokens([clap.prepare(clip, 16_000, padding="pad") for clip in clips], [0.5, 2.5])
    rows, steps, width = tokens.hidden_BAC.shape
    assert (rows, width) == (2, clap.audio_width) and steps % 3 == 0
    inside = tokens.seconds_BA[0][tokens.mask_BA[0]]
    assert 0 < float(inside.max()) < 0.5
    assert bool(tokens.mask_BA[1].all()) and float(tokens.seconds_BA[1].max()) < 2.5
    text = clap.text_tokens(["a dog", "a dog barks then rain falls"])
    assert text.hidden_BLC.shape == (2, 8, clap.text_width)
    assert text.mask_BL.sum(1).tolist() == [4, 8]


def test_tokens_of_a_clip_whose_length_rounds_up(clap: ClapModel) -> None:
    # 64,001 / 2 samples are cut to 32,000 and so to 2 windows; from the seconds they are 32,001.
    waveform = noise(64_001 / 32_000, 32_000)
    windows = clap.prepare(waveform, 32_000)
    tokens = clap.audio_tokens([windows], [len(waveform) / 32_000])
    assert len(windows) == 2
    assert tokens.hidden_BAC.shape[:2] == tokens.seconds_BA.shape == tokens.mask_BA.shape


# ----------------------------------------------------------------------------------------------------- cache


def test_texts_met_before_come_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clap()
    embedded: list[list[str]] = []
    make = model.text_features

    def watched(prompts: list[str]) -> torch.Tensor:
        embedded.append(list(prompts))
        return make(prompts)

    monkeypatch.setattr(model, "text_features", watched)
    first = model.embed_text(["a dog", "rain", "a dog"])
    again = model.embed_text(["rain", "a bell", "a dog"])
    assert embedded == [["a dog", "rain"], ["a bell"]]
    assert (model.cache.hits, model.cache.misses) == (2, 4)
    assert torch.equal(first[0], first[2])
    assert torch.equal(again[[2, 0]], first[:2])


def test_cache_is_bounded_and_drops_the_least_recently_used() -> None:
    cache = TextCache(2)
    cache.put({"one": torch.ones(1), "two": torch.ones(1)})
    cache.get(["one"])
    cache.put({"three": torch.ones(1)})
    assert set(cache.get(["one", "two", "three"])) == {"one", "three"}
    assert (cache.hits, cache.misses) == (3, 1)


def test_kept_embeddings_do_not_keep_their_batch(clap: ClapModel) -> None:
    clap.embed_text(["a cat", "a siren wails", "a bird"])
    (kept,) = clap.cache.get(["a cat"]).values()
    assert kept.untyped_storage().nbytes() == 4 * clap.dimension


def test_cache_holds_under_threads() -> None:
    cache = TextCache(8)
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        try:
            for _ in range(500):
                names = [str(number) for number in draw.integers(0, 20, 4)]
                found = cache.get(names)
                assert all(float(value) == float(name) for name, value in found.items())
                cache.put({name: torch.tensor(float(name)) for name in names})
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert cache.hits + cache.misses == 4 * 500 * 4
    assert len(cache.get([str(number) for number in range(20)])) == 8


# --------------------------------------------------------------------------------------------------- folders


def test_loads_what_was_saved(clap: ClapModel, folder: Path) -> None:
    loaded = load_clap(folder)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.device == torch.device("cpu")
    for found, wanted in (
        (loaded.embed_text(["a dog barks"]), clap.embed_text(["a dog barks"])),
        (loaded.embed_audio([noise(1.7)], 16_000), clap.embed_audio([noise(1.7)], 16_000)),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_settings_of_our_own_are_saved(tmp_path: Path) -> None:
    model = tiny_clap(padding="pad")
    setattr(model.extractor, QUANTISE, True)
    model.save(tmp_path / "clap")
    loaded = load_clap(tmp_path / "clap")
    assert torch.equal(loaded.prepare(noise(0.3), 16_000), model.prepare(noise(0.3), 16_000))
    assert getattr(loaded.extractor, QUANTISE) is True


def test_transformers_reads_the_same_folder(clap: ClapModel, folder: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    assert type(model).__name__ == "ClapModel" and type(processor).__name__ == "ClapProcessor"
    inputs = processor(text="a dog barks", audio=[noise(0.6)], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        audio = model.get_audio_features(input_features=inputs["input_features"]).pooler_output
        text = model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).pooler_output
    torch.testing.assert_close(clap.embed_audio([noise(0.6)], 16_000), audio, rtol=0, atol=1e-5)
    torch.testing.assert_close(clap.embed_text(["a dog barks"]), text, rtol=0, atol=1e-6)


def test_half_precision_is_read_as_float32(clap: ClapModel, folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "half"))
    weights = load_file(target / WEIGHTS)
    save_file(
        {key: value.half() if value.is_floating_point() else value for key, value in weights.items()},
        target / WEIGHTS,
        metadata={"format": "pt"},
    )
    loaded = load_clap(target)
    assert loaded.clap.dtype == torch.float32
    assert float((loaded.embed_text(["a dog"]) * clap.embed_text(["a dog"])).sum()) > 0.9999


def test_counters_may_be_missing(folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "clap"))
    weights = load_file(target / WEIGHTS)
    del weights["text_model.embeddings.position_ids"], weights["text_model.embeddings.token_type_ids"]
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(load_clap(target).embed_text(["a dog"]), load_clap(folder).embed_text(["a dog"]))


def _edit(file: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**data, **changes}))

    return change


def _change_keys(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["text_projection.linear1.bias"]
    weights["extra"] = torch.zeros(1)
    weights["audio_projection.linear2.bias"] = torch.zeros(3)
    save_file(weights, folder / WEIGHTS)


def _pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def _five_words(folder: Path) -> None:
    words = {word: index for index, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", "a"))}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json can't be read"),
        (_edit("config.json", model_type="bert"), "holds a bert, not a CLAP model"),
        (_edit("config.json", text_config={"hidden_size": "wide"}), "config.json is not valid"),
        (_edit("config.json", audio_config={"depths": [1], "spec_size": 64}), "are not this model's"),
        (_change_keys, "1 missing keys: text_projection.linear1.bias; 1 unknown keys: extra; 1 wrong shapes"),
        (_truncate, "truncated or not safetensors"),
        (_pickle_only, "only a pickle payload (pytorch_model.bin); weights must be safetensors"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "preprocessor_config.json is missing",
        ),
        (_edit("preprocessor_config.json", hop_length=20), "has 801 frames, but the model takes 2 to 128"),
        (_edit("preprocessor_config.json", hop_length="long"), "can't be loaded"),
        (_edit("preprocessor_config.json", truncation="fusion"), "'fusion', not 'rand_trunc'"),
        (_edit("preprocessor_config.json", padding="loop"), "padding is 'loop', not one of"),
        (_five_words, f"its tokenizer has 5 tokens, but the text encoder has {4 + len(WORDS)}"),
        (_no_tokenizer, "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "holds no tokenizer"),
        (_edit("tokenizer_config.json", pad_token=None), "has no pad_token"),
    ],
)
def test_damaged_folder_is_refused(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "clap"))
    damage(target)
    with pytest.raises(ModelFormatError) as caught:
        load_clap(target)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder_and_wrong_device(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not a folder"):
        load_clap(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="device: 'toaster' can't be used"):
        load_clap(folder, device="toaster")
