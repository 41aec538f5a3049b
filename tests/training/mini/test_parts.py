"""The mini family's programs: their pure parts, on the smallest real thing."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from services.errors import InvalidInputError
from services.models.mel import LogMel
from services.models.mini import mini_folder
from services.models.tango.loading import load_tango
from training.loop.fit import LoopConfig
from training.loop.run_folder import JOURNAL, read_journal
from training.mini import autoencoder, denoiser, distillation, parsing, text_encoder, vocoder
from training.mini.latents import LatentSet, load_shards
from training.mini.package import assemble, restore
from training.mini.parts import train_part
from training.soundworld.captions import WEB_CAPTIONS, CaptionTruth
from training.soundworld.reading import grammar_reader, truth_reading
from training.soundworld.scenes import SHORT, split_of
from training.soundworld.synthesis import CLASSES


def test_each_word_is_labelled_with_its_event_and_rank() -> None:
    tokenizer = text_encoder.build_tokenizer()
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids, labels = parsing.labelled_caption(rng, tokenizer)
        assert len(ids) == len(labels) <= text_encoder.TEXT_LENGTH
        assert ids[-1] == tokenizer.eos_token_id
        assert all(labels[i] == parsing.IGNORED for i, one in enumerate(ids) if one == tokenizer.unk_token_id)
        roles = {label % parsing.ROLES for label in labels if label != parsing.IGNORED}
        classes = {label // parsing.ROLES for label in labels if label != parsing.IGNORED}
        assert roles in ({0, 1}, {0, 1, 2}, {3}, {4})
        assert max(classes) < len(CLASSES)


@pytest.mark.parametrize(
    "text",
    [
        "A DOG barks; after that, a bell rings!",
        "“A dog barks”… after that – a bell rings.",
        "a dog barks,after that,a bell rings",
    ],
)
def test_case_and_kind_of_punctuation_make_no_difference(text: str) -> None:
    tokenizer = text_encoder.build_tokenizer()
    words = ["a", "dog", "barks", ",", "after", "that", ",", "a", "bell", "rings"]
    assert tokenizer.tokenize(text) == words


def test_an_earlier_text_encoder_is_continued_and_new_words_begin_as_their_class() -> None:
    tokenizer = text_encoder.build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    known = {word: i for i, word in enumerate(w for w in vocabulary if w not in ("dogs", "hounds"))}
    earlier = text_encoder.build(len(known))
    old = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(known, unk_token="<unk>")))
    encoder = text_encoder.build(len(tokenizer))
    classes = {"dogs": "dog", "dog": "dog", "barks": "dog"}
    parsing.continue_embeddings(encoder, earlier, tokenizer, old, classes)
    taken, found = earlier.shared.weight, encoder.shared.weight
    torch.testing.assert_close(found[vocabulary["siren"]], taken[known["siren"]])
    torch.testing.assert_close(found[vocabulary["dogs"]], (taken[known["dog"]] + taken[known["barks"]]) / 2)
    deep = "encoder.block.1.layer.0.SelfAttention.q.weight"
    torch.testing.assert_close(encoder.state_dict()[deep], earlier.state_dict()[deep])


def test_standardised_latents_decode_to_what_they_did_before() -> None:
    torch.manual_seed(0)
    vae = autoencoder.build().eval()
    mel = torch.randn(4, 1, 64, 64) * 2 - 7
    with torch.no_grad():
        before = vae.decode(vae.encode(mel).latent_dist.mean).sample
        variance = vae.encode(mel).latent_dist.var
        std = vae.encode(mel).latent_dist.mean.std((0, 2, 3))
        autoencoder.standardise_latents(vae, mel)
        posterior = vae.encode(mel).latent_dist
        after = vae.decode(posterior.mean).sample
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(16), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(posterior.var, variance / std[None, :, None, None] ** 2, rtol=1e-3, atol=1e-3)


def test_an_autoencoder_that_is_turned_down_writes_the_same_at_another_level() -> None:
    torch.manual_seed(0)
    vae = autoencoder.build().eval()
    mel = torch.randn(2, 1, 64, 64) * 2 - 7
    shift = math.log(0.5)
    with torch.no_grad():
        latents = vae.encode(mel).latent_dist.mean
        before = vae.decode(latents).sample
        autoencoder.turn_down(vae, 0.5)
        torch.testing.assert_close(vae.decode(latents).sample, before + shift)
        again = vae.encode(mel + shift).latent_dist.mean
    inside = slice(3, -3)
    torch.testing.assert_close(
        again[:, :, inside, inside], latents[:, :, inside, inside], rtol=0.02, atol=0.02
    )


def test_captions_for_an_earlier_text_encoder_have_its_words_only() -> None:
    known = {
        "a",
        "dog",
        "siren",
        "barks",
        "barking",
        "wails",
        "wailing",
        "then",
        "followed",
        "by",
        "after",
        "before",
        "and",
    }
    truth = CaptionTruth(classes=("dog", "siren"), relation="then")
    rng = np.random.default_rng(0)
    captions = {distillation.first_caption(truth, rng, known) for _ in range(60)}
    assert "a dog barks then a siren wails" in captions
    for caption in captions:
        assert set(caption.replace(",", "").split()) <= known
        assert grammar_reader().read(caption).steps == truth_reading(truth).steps


def test_a_quarter_of_a_batch_is_blank_a_quarter_late_and_the_rest_spread() -> None:
    noising = denoiser.draw_noising(np.random.default_rng(0), (40, 2, 4, 4))
    timesteps, blank = noising.timesteps_B, noising.blank_B
    assert int(blank.sum()) == 10
    assert bool((timesteps[blank] >= 900).all())
    assert bool((timesteps[10:20] >= 800).all())
    assert [int(t) // 50 for t in timesteps[20:]] == list(range(20))
    assert int(timesteps.max()) < 1000


def test_the_velocity_error_is_zero_for_the_true_velocity_and_blank_clips_show_noise_alone() -> None:
    schedule = denoiser.schedule()
    clean, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    noising = denoiser.Noising(
        timesteps_B=torch.tensor([10, 500, 990]),
        noise_BCTF=noise,
        blank_B=torch.tensor([False, False, True]),
    )

    class Oracle(torch.nn.Module):
        def forward(self, noisy, timesteps, **_):  # type: ignore[no-untyped-def]
            alpha = schedule.alphas_cumprod[timesteps][:, None, None, None]
            torch.testing.assert_close(noisy[:2], (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)[:2])
            torch.testing.assert_close(noisy[2], noise[2])
            return type("Output", (), {"sample": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean})

    error = denoiser.v_error(Oracle(), clean, noising, (torch.zeros(3, 1, 1), torch.ones(3, 1).bool()))
    torch.testing.assert_close(error, torch.zeros(3), rtol=0, atol=1e-6)


def test_training_captions_are_of_the_training_split_or_empty() -> None:
    rng = np.random.default_rng(0)
    truth = CaptionTruth(classes=("dog", "siren"), relation="then")
    captions = [denoiser.training_caption(truth, WEB_CAPTIONS, rng) for _ in range(500)]
    assert np.mean([not c for c in captions]) == pytest.approx(denoiser.CONDITION_DROPOUT, abs=0.05)
    assert {split_of(c) for c in captions if c} == {"train"}


def test_shards_come_back_in_order_with_their_truth(tmp_path: Path) -> None:
    for number, value in enumerate((1.0, 2.0)):
        np.savez(
            tmp_path / f"short-{number:04d}.npz",
            latents=np.full((2, 16, 4, 2), value, np.float16),
            classes=np.array([[0, 1, -1], [2, -1, -1]]),
            relations=np.array([1, 0]),
        )
    data = load_shards(tmp_path, "short-*.npz")
    assert isinstance(data, LatentSet)
    assert data.latents_BCTF[:, 0, 0, 0].tolist() == [1, 1, 2, 2]
    assert data.truths[0] == CaptionTruth(classes=(CLASSES[0], CLASSES[1]), relation="then")
    assert data.truths[3] == CaptionTruth(classes=(CLASSES[2],), relation="single")
    with pytest.raises(SystemExit, match="latents"):
        load_shards(tmp_path, "long-*.npz")
    assert SHORT.duration == 2.56


def test_the_spectral_distance_is_zero_for_equal_sound_and_grows_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(2, 4096, generator=generator) * 0.1
    noise = torch.randn(2, 4096, generator=generator) * 0.1
    assert float(vocoder.spectral_distance(sound, sound)) == 0.0
    little, much = (float(vocoder.spectral_distance(sound + level * noise, sound)) for level in (0.1, 1.0))
    assert 0 < little < much


def test_the_neural_vocoder_makes_a_hop_of_samples_a_frame() -> None:
    mels, samples = vocoder.crops(0, LogMel())
    assert mels.shape == (vocoder.BATCH, vocoder.FRAMES, 64)
    with torch.no_grad():
        assert vocoder.build()(mels).shape == samples.shape == (vocoder.BATCH, vocoder.FRAMES * 160)


def test_shipped_parts_come_apart_and_go_together_again(tmp_path: Path) -> None:
    restore(tmp_path)
    again = assemble(tmp_path, tmp_path / "mini" / "final")
    shipped = load_tango(mini_folder("mini"))
    for part in ("unet", "vae", "text_encoder"):
        wanted = getattr(shipped, part).state_dict()
        for name, value in getattr(again, part).state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, wanted[name]), name
    assert again.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    assert denoiser.TextSide(tmp_path / "text_encoder")(["A dog barks"])[0].shape == (
        1,
        text_encoder.TEXT_LENGTH,
        128,
    )


def test_a_part_is_trained_step_by_step_and_goes_on_where_it_was(tmp_path: Path) -> None:
    config, steps = LoopConfig(steps=3, batch=2, ema=0.9), list[int]()
    module = torch.nn.Linear(2, 2)

    def loss_at(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        steps.append(step)
        return module(torch.ones(2)).square().mean(), {"twice": 2.0 * step}

    train_part(module, loss_at, config, tmp_path / "part", title="part")
    train_part(module, loss_at, replace(config, steps=5), tmp_path / "part", title="part")
    assert steps == [0, 1, 2, 3, 4]
    assert [row["twice"] for row in read_journal(tmp_path / "part" / JOURNAL)] == [0, 2, 4, 6, 8]


def test_what_was_trained_is_not_overwritten_by_the_shipped_parts(tmp_path: Path) -> None:
    (tmp_path / "mini").mkdir()
    with pytest.raises(InvalidInputError, match="holds mini already"):
        restore(tmp_path)
