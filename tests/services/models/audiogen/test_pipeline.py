"""AudioGen as a generator: sampling, the engine's steps, and the folder."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from services.api.generation import Event, Finished, Preview, Progress
from services.engine import Engine, EngineConfig, Handle
from services.errors import InvalidInputError, ModelFormatError, RequestCancelledError
from services.models.architectures import check_generator, load_generator
from services.models.audiogen.language_model import token_logits
from services.models.audiogen.pattern import undelayed
from services.models.audiogen.pipeline import AudioGenPipeline
from services.models.audiogen.sampling import TokenScheduler
from services.models.latent import clip_generator, guide
from services.models.manifest import write_manifest
from tests.services.engine.watching import Watch
from tests.tiny import tiny_audiogen
from training.finetuning.session import open_session
from training.runs.recipes import sft_smoke

PROMPT = "a dog barks then a siren wails"
ONE = EngineConfig(threads=1)
SPECIAL = 24


@pytest.fixture(scope="module")
def audiogen() -> AudioGenPipeline:
    torch.set_num_threads(1)
    return tiny_audiogen()


@torch.no_grad()
def _by_hand(audiogen: AudioGenPipeline, seed: int, scale: float, duration: float) -> Tensor:
    """The token sequence by whole passes over what there is so far."""
    text = audiogen.encode([PROMPT], length=audiogen.text_length(PROMPT))["embeds"]
    pair = audiogen.projection(torch.cat([torch.zeros_like(text), text]))
    sequence, generator = audiogen.noise(duration, clip_generator(0)), clip_generator(seed)
    for step in range(sequence.shape[-1] - 1):
        so_far = sequence[..., : step + 1].long().repeat(2, 1, 1)
        logits = token_logits(audiogen.decoder, so_far, pair)[..., -1, :]
        (sequence,) = audiogen.scheduler.step(guide(logits[:1], logits[1:], scale), step, sequence, generator)
    return sequence


def test_the_engine_makes_the_clip_of_the_plain_loop(audiogen: AudioGenPipeline) -> None:
    with Engine(audiogen, ONE) as engine:
        watch = Watch()
        engine.submit(engine.request(PROMPT, seed=5, duration=0.8), watch)
        (clip,) = watch.clips()
    sequence = _by_hand(audiogen, 5, 3.0, 0.8)
    assert not (undelayed(sequence) == SPECIAL).any()
    expected = audiogen.decode(sequence, 12_800)[0].numpy()
    assert np.allclose(clip.waveform(), expected, atol=1e-5)
    progress = watch.of(Progress)
    assert [event.step for event in progress] == list(range(1, 24)), "20 frames and 3 delays"
    assert {event.num_inference_steps for event in progress} == {23}


def test_the_pipeline_itself_makes_the_same_clip(audiogen: AudioGenPipeline) -> None:
    made = audiogen(PROMPT, generator=[clip_generator(5)], output_type="latent").audios
    assert torch.equal(made, _by_hand(audiogen, 5, 3.0, 0.64))


def test_requests_at_other_steps_share_calls(audiogen: AudioGenPipeline) -> None:
    with Engine(audiogen, EngineConfig(threads=1, batch_shapes=(4,))) as engine:
        alone = engine.generate(engine.request(PROMPT, seed=5)).clips[0].waveform()
        first, second, started = Watch(), Watch(), threading.Event()
        late = engine.request(PROMPT, seed=6)

        def join(event: Event) -> None:
            if isinstance(event, Progress) and event.step == 3 and not started.is_set():
                started.set()
                engine.submit(late, second)

        first.then = join
        engine.submit(engine.request(PROMPT, seed=5), first)
        together = first.clips()[0].waveform()
        assert isinstance(second.wait(), Finished)
        later = engine.generate(late).clips[0].waveform()
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(second.clips()[0].waveform(), later, atol=1e-5)


def test_a_cancelled_request_ends_within_a_step(audiogen: AudioGenPipeline) -> None:
    handles: list[Handle] = []
    submitted = threading.Event()

    def cancel(event: Event) -> None:
        if isinstance(event, Progress) and event.step == 2:
            assert submitted.wait(30)
            handles[0].cancel()

    with Engine(audiogen, ONE) as engine:
        watch = Watch(cancel)
        handles.append(engine.submit(engine.request(PROMPT, seed=1, duration=2.56), watch))
        submitted.set()
        assert isinstance(watch.error(), RequestCancelledError)
    assert len(watch.of(Progress)) == 2


def test_steps_follow_from_the_duration(audiogen: AudioGenPipeline) -> None:
    with Engine(audiogen, ONE) as engine:
        assert engine.generate(engine.request(PROMPT, seed=1)).warnings == ()
        (warning,) = engine.generate(engine.request(PROMPT, seed=1, num_inference_steps=5)).warnings
    assert warning.startswith("num_inference_steps 5 has no effect: for 0.64 s this model takes 19")


def test_greedy_needs_no_seed_and_samples_differ(audiogen: AudioGenPipeline) -> None:
    def tokens(seed: int, scheduler: str) -> Tensor:
        made: Tensor = audiogen(
            PROMPT, scheduler=scheduler, output_type="latent", generator=clip_generator(seed)
        ).audios
        return made

    assert torch.equal(tokens(1, "greedy"), tokens(2, "greedy"))
    assert torch.equal(tokens(1, "sample"), tokens(1, "sample"))
    assert not torch.equal(tokens(1, "sample"), tokens(2, "sample"))
    with pytest.raises(InvalidInputError, match="scheduler"):
        tokens(1, "ddim")


def test_only_the_top_k_tokens_are_drawn_by_their_probabilities() -> None:
    scheduler = TokenScheduler(top_k=3, temperature=0.5, special=8)
    logits = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.9, 0.0, 0.1, 0.2]).expand(1, 1, 8)
    start, generator = torch.full((1, 1, 3), 8.0), clip_generator(3)
    drawn = [int(scheduler.step(logits, 0, start, generator)[0][0, 0, 1]) for _ in range(4_000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=8) / 4_000
    wanted = torch.zeros(8)
    wanted[[1, 4, 2]] = torch.tensor([2.0, 1.8, 1.0]).softmax(0)
    assert torch.allclose(shares, wanted, atol=0.03)


def test_logits_that_are_not_finite_are_no_tokens() -> None:
    scheduler = TokenScheduler(special=8)
    (following,) = scheduler.step(torch.full((1, 1, 8), torch.nan), 0, torch.full((1, 1, 3), 8.0))
    assert following[0, 0, 1].isnan()


def test_previews_show_what_is_made_so_far(audiogen: AudioGenPipeline) -> None:
    with Engine(audiogen, ONE) as engine:
        watch = Watch()
        engine.submit(engine.request(PROMPT, seed=1, preview_interval_steps=9), watch)
        watch.clips()
    assert [preview.step for preview in watch.of(Preview)] == [9, 18]
    assert all(preview.mel_TM.shape == (16, 64) for preview in watch.of(Preview))


def test_an_empty_prompt_is_the_null_condition(audiogen: AudioGenPipeline) -> None:
    assert not audiogen.encode(["", ""], length=4)["embeds"].any()
    padded = audiogen.encode([PROMPT], length=12)["embeds"][0]
    assert padded[: audiogen.text_length(PROMPT)].any(-1).all()
    assert not padded[audiogen.text_length(PROMPT) :].any()


def test_tokens_of_a_waveform_decode_to_a_clip(audiogen: AudioGenPipeline) -> None:
    waveform = torch.sin(torch.arange(10_240) * 0.1)[None] * 0.2
    sequence = audiogen.encode_audio(waveform)
    assert sequence.shape == (1, 4, audiogen.latent_frames(0.64))
    assert audiogen.decode(sequence, 10_240).shape == (1, 10_240)


def test_a_saved_folder_gives_the_same_clip(audiogen: AudioGenPipeline, tmp_path: Path) -> None:
    audiogen.save_pretrained(tmp_path / "model")
    check_generator(tmp_path / "model")
    loaded = load_generator(tmp_path / "model")
    assert isinstance(loaded, AudioGenPipeline)
    both = [
        one(PROMPT, generator=clip_generator(5), output_type="latent").audios for one in (audiogen, loaded)
    ]
    assert torch.equal(*both)


def test_parts_that_do_not_fit_are_named() -> None:
    first, second = tiny_audiogen(), tiny_audiogen(codes=12)
    with pytest.raises(ModelFormatError, match=r"decoder.vocab_size is 24 but codec.codebook_size is 12"):
        AudioGenPipeline(
            tokenizer=first.tokenizer,
            text_encoder=first.text_encoder,
            projection=first.projection,
            decoder=first.decoder,
            codec=second.codec,
            scheduler=first.scheduler,
        )


def test_fine_tuning_is_refused(audiogen: AudioGenPipeline, tmp_path: Path) -> None:
    audiogen.save_pretrained(tmp_path / "model")
    write_manifest(tmp_path / "model", name="audiogen", version="1", license="Apache-2.0")
    config = replace(sft_smoke(), start=f"file:{tmp_path / 'model'}")
    with pytest.raises(InvalidInputError, match=r"start: is a language model .*which can't be fine-tuned"):
        open_session(config, tmp_path / "out", (), {}, fresh=False)
