"""Train a generator from nothing on recordings; `training.runs.new` also evaluates and registers it.

    train_new(NewModel(data=Path("my-sounds"), minutes=60), Path("build/new/my-model"))

Next to the model's folder ``NAME`` are ``NAME.parts``, with the spectrograms, the autoencoder's run and the
complete folder that the denoiser's training starts from, and ``NAME.run``, the denoiser's run. Every stage
resumes; what is finished is not done again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerBase

from services.errors import MilongaError, invalid
from services.models.architectures import check_generator
from services.models.hifigan import VocoderMel
from services.models.ready_made import TextSide, ready_text_encoder, ready_vocoder
from services.models.state_dicts import quiet_loading
from services.models.tango.geometry import Geometry
from services.models.words import is_readable
from services.models.writing import replaced_folder
from training.data.captions import CaptionExample
from training.data.recorded_scenes import RecordedScene, RecordedScenes
from training.data.recordings import Recording, read_recordings
from training.data.splits import Splits, describe_splits, split_recordings
from training.data.store import digest_of_value, write_json
from training.data.usable import known_captions, language_warning, readable_recordings
from training.finetuning.session import TRAINING
from training.finetuning.sft import Captioned, train_sft
from training.loop.config import Plain, flatten
from training.loop.fit import LoopConfig
from training.loop.progress import say
from training.loop.run_folder import check_output, claim_folder
from training.pretraining.autoencoder import Mels, train_autoencoder
from training.pretraining.budget import autoencoder_seconds, denoiser_seconds, steps_in
from training.pretraining.config import NewModel
from training.pretraining.spectrograms import cache_spectrograms
from training.pretraining.start import build_denoiser, write_start

PLAN: Final = "plan.json"
"""Steps that a budget of minutes became: measured once, then kept."""
FREE: Final = ("autoencoder.loop.checkpoint_seconds", "denoiser.loop.checkpoint_seconds",
               "autoencoder.loop.threads", "denoiser.loop.threads")  # fmt: skip
"""Settings that may differ when a run is resumed."""
ATTRIBUTION: Final = ("license", "licence", "author", "attribution", "url", "freesound_id", "source")
"""Fields of a list that a model card passes on."""
COMPARED: Final = 32
"""Held-out scenes whose denoising errors are compared."""
UNREADABLE: Final = 0.1
"""Share of unreadable clips from which nothing is trained."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sounds:
    """The readable recordings of a data set, divided, and the scenes of each part."""

    splits: Splits
    train: RecordedScenes
    held_out: RecordedScenes | None
    """None: too few recordings are held out."""
    unreadable: dict[str, str]
    """Clips that can't be read, with the reason."""

    def scenes(self, count: int) -> list[RecordedScene]:
        """Return the first scenes of the training part."""
        return [self.train.scene(index) for index in range(count)]


def train_new(config: NewModel, output: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Train the model of `config` into the folder `output`; return the report in its training.json.

    Raises:
        InvalidInputError: settings or data are wrong, or the run that is there has other settings.
        ModelError: a ready-made part was refused.
        OutputError: `output` can't be written, or holds something else.
    """
    check_output(output, TRAINING)
    vocoder, mel = ready_vocoder(config.vocoder)
    text = ready_text_encoder(config.text_encoder)
    config = at_rate(config, mel)
    sounds = read_sounds(config, text.tokenizer)
    parts = output.with_name(f"{output.name}.parts")
    settings: dict[str, Plain] = flatten(config) | {"data_digest": _digest(sounds)}
    claim_folder(parts, settings, fresh=fresh, free=FREE)
    geometry = geometry_of(config, mel)
    samples = geometry.latent_frames(config.scenes.duration) * geometry.latent_downsampling * mel.hop_length
    scenes = sounds.scenes(max(config.count, config.autoencoder_count))
    clips = [scene.clip for scene in scenes[: config.autoencoder_count]]
    mels = cache_spectrograms(clips, mel, samples, parts / "spectrograms")
    config = planned(config, mels, geometry, text, parts / PLAN, fresh=fresh)
    vae = _autoencoder(config, mels, parts, fresh=fresh)
    del mels
    start = parts / "start"
    if fresh or not (start / "model_index.json").exists():
        write_start(config, vae, vocoder, mel, text, start)
    check_generator(start)
    del vae, vocoder, text
    denoiser = replace(config.denoiser, name=config.name, start=f"file:{start}", license=config.license)
    return train_sft(denoiser, output, fresh=fresh, captioned=_captioned(config, scenes, sounds))


def at_rate(config: NewModel, mel: VocoderMel) -> NewModel:
    """Return `config` with scenes at the vocoder's sampling rate."""
    return replace(config, scenes=replace(config.scenes, sampling_rate=mel.sampling_rate))


def geometry_of(config: NewModel, mel: VocoderMel) -> Geometry:
    """Return the sizes of the model."""
    return Geometry(
        sampling_rate=mel.sampling_rate,
        hop_length=mel.hop_length,
        mel_bins=mel.mel_bins,
        latent_channels=config.autoencoder.latent_channels,
        latent_downsampling=2 ** (len(config.autoencoder.widths) - 1),
        frame_multiple=2 ** (len(config.architecture.widths) - 1),
        default_duration=config.scenes.duration,
        max_duration=2 * config.scenes.duration,
    )


def read_sounds(config: NewModel, tokenizer: PreTrainedTokenizerBase) -> Sounds:
    """Read and divide the recordings. Each is decoded once, to find those that can't be read.

    Captions that the text encoder of `tokenizer` does not know are left out. Raises `InvalidInputError` if
    too many recordings can't be read, or too few are left.
    """
    unusable: dict[str, str] = {}
    recordings = read_recordings(config.data, config.audio_root, unusable)
    found, unreadable = readable_recordings(recordings, UNREADABLE)
    left = known_captions(
        [one for one in found if one.captions],
        partial(is_readable, tokenizer),
        config.text_encoder,
        "write captions with words that it knows (of classes: captions.json), or give one that knows them: "
        "--set model.text_encoder=FOLDER",
    )
    if warning := language_warning(tokenizer, (text for one in left for text in one.captions)):
        say(f"warning: {warning}")
    if unusable:
        place, reason = next(iter(unusable.items()))
        say(f"warning: {len(unusable)} captions are unusable and left out; the first, {place}: {reason}")
    splits = split_recordings(left, config.split)
    if len(splits.train) < config.least_clips:
        raise invalid(
            "data",
            f"{config.data} has {len(splits.train)} readable clips with captions to train on, and a model "
            f"needs {config.least_clips} or more; add recordings, or hold out fewer (model.split)",
        )
    scenes, sounds = config.scenes, {one.sound or one.captions[0] for one in splits.train}
    if len(sounds) == 1 and scenes.single < 1:
        say(
            f"warning: all recordings are of one class ({next(iter(sounds))[:60]}), so every scene has one "
            "event; the model will not learn what then and while mean: add recordings of another class"
        )
        scenes = replace(scenes, single=1.0, sequence=0.0)
    held_out = None
    if len({one.sound or one.captions[0] for one in splits.held_out}) >= (2 if scenes.single < 1 else 1):
        held_out = RecordedScenes(splits.held_out, replace(scenes, seed=scenes.seed + 1))
    return Sounds(
        splits=splits,
        train=RecordedScenes(splits.train, scenes),
        held_out=held_out,
        unreadable={clip.name: why for clip, why in unreadable.items()},
    )


def planned(
    config: NewModel, mels: Mels, geometry: Geometry, text: TextSide, path: Path, *, fresh: bool = False
) -> NewModel:
    """Return `config` with the steps that fit into its minutes, as measured when the run began."""
    if not config.minutes:
        return config
    if fresh or not path.exists():
        seconds, share = 60 * config.minutes, config.autoencoder_share
        width = text.encoder.config.hidden_size
        autoencoder = autoencoder_seconds(mels, config.autoencoder)
        unet = build_denoiser(config.architecture, config.autoencoder.latent_channels, width)
        shape = geometry.latent_shape(config.scenes.duration)
        denoiser = denoiser_seconds(unet, config.denoiser.loop, shape, config.text_length, width)
        plan = {
            "autoencoder_steps": steps_in(share * seconds, autoencoder, config.autoencoder.loop.steps),
            "denoiser_steps": steps_in((1 - share) * seconds, denoiser, config.denoiser.loop.steps),
            "autoencoder_step_seconds": round(autoencoder, 4),
            "denoiser_step_seconds": round(denoiser, 4),
        }
        write_json(path, plan)
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        steps = int(plan["autoencoder_steps"]), int(plan["denoiser_steps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MilongaError(f"{path} is damaged ({error}); give --fresh to start over") from error
    say(f"{config.minutes:g} minutes: {steps[0]} steps of the autoencoder, {steps[1]} of the denoiser")
    return replace(
        config,
        autoencoder=replace(config.autoencoder, loop=_shortened(config.autoencoder.loop, steps[0])),
        denoiser=replace(config.denoiser, loop=_shortened(config.denoiser.loop, steps[1])),
    )


def _shortened(loop: LoopConfig, steps: int) -> LoopConfig:
    """Return the loop with fewer steps, and an average and a warm-up that suit them."""
    return replace(
        loop,
        steps=steps,
        warmup=min(loop.warmup, max(1, steps // 10)),
        ema=min(loop.ema, 1 - 10 / (steps + 10)),
    )


def _autoencoder(config: NewModel, mels: Mels, parts: Path, *, fresh: bool) -> Any:
    """Return the trained autoencoder, from its folder if it is finished."""
    run, folder = parts / "autoencoder.run", parts / "autoencoder"
    claim_folder(
        run, flatten(config.autoencoder), fresh=fresh, free=[name.partition(".")[2] for name in FREE]
    )
    if fresh or not (folder / "config.json").exists():
        vae = train_autoencoder(mels, config.autoencoder, run)
        with replaced_folder(folder) as temporary:
            vae.save_pretrained(temporary, safe_serialization=True)
    with quiet_loading():
        return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)


def _captioned(config: NewModel, scenes: Sequence[RecordedScene], sounds: Sounds) -> Captioned:
    """Return the scenes as examples, and some of held-out recordings to compare errors on."""
    held_out = sounds.held_out
    learned = [CaptionExample(clip=scene.clip, caption=scene.caption) for scene in scenes[: config.count]]
    compared = [] if held_out is None else [held_out.scene(index) for index in range(COMPARED)]
    return Captioned(
        examples=tuple(learned),
        held_out=tuple(CaptionExample(clip=scene.clip, caption=scene.caption) for scene in compared),
        digest=digest_of_value([[one.clip.digest, one.caption] for one in learned]),
        unusable={},
        about={
            **describe_splits(config.data.name, sounds.splits),
            "unreadable": sounds.unreadable,
            "attributions": attributions(sounds.splits.train),
        },
    )


def attributions(recordings: Sequence[Recording]) -> list[dict[str, str]]:
    """Return what the data set states of licence and origin, one row per recording that has any."""
    rows = []
    for one in recordings:
        fields = {name.lower(): value for name, value in one.fields.items()}
        stated = {name: str(fields[name]) for name in ATTRIBUTION if fields.get(name) not in (None, "")}
        if stated:
            rows.append({"clip": Path(one.clip.name).name, **stated})
    return rows


def _digest(sounds: Sounds) -> str:
    """Return the digest of the recordings' content, captions and division."""
    return digest_of_value(
        [
            [[one.clip.digest, list(one.captions), one.sound] for one in part]
            for part in (sounds.splits.train, sounds.splits.held_out)
        ]
    )
