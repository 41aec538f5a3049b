"""Where the clips of an evaluation come from: a model that generates them, or a folder that holds them.

What a model generates is kept under the digest of its weights and the settings, a file a prompt and seed; so
an evaluation that was stopped goes on, and another one of the same model generates nothing anew.
"""

import gc
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from services.api.generation import Generation, GenerationOptions
from services.clip_folder import ClipFolder
from services.engine import EngineConfig
from services.errors import FieldViolation, InvalidInputError
from services.files import write_atomically
from services.local import open_clip_maker
from services.weights.uri import EMBEDDED, ModelURI, ResolvedModel, resolve
from training.data.store import digest_of
from training.evaluation.config import EvaluationConfig, Sampling
from training.evaluation.prompts import Prompt, read_prompts, world_prompts
from training.loop.progress import progress

INDEX = "index.jsonl"
"""The list of clips in a folder that `milonga generate --prompts` wrote."""
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<place>.+)")
_LISTED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A clip that every source must have: what the figures of two models are paired by."""

    prompt: Prompt
    seed: int | None
    """None: a clip from elsewhere, whose seed is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that generates the clips."""

    name: str
    model: ResolvedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """Clips that are there already."""

    name: str
    clips: Mapping[str, Sequence[tuple[int | None, Path]]]
    """Seeds, as far as known, and files of each prompt's clips, in the order of its index."""
    identity: Mapping[str, Any]
    """The model that made them, as far as it is known."""


Source = ModelSource | FolderSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """The clips of one source, in the order of the plan."""

    name: str
    files: tuple[Path, ...]
    identity: Mapping[str, Any]
    """The model's name, version, digest and licence, as far as they are known."""


def open_source(text: str) -> Source:
    """The source that ``[NAME=]PLACE`` names: a model URI, or the path of a folder of clips.

    Raises `InvalidInputError` where it is neither, `ModelError` where the model was refused.
    """
    named = _NAMED.fullmatch(text)
    place = named["place"] if named else text
    path = Path(place).expanduser()
    if place.partition("#")[0] not in EMBEDDED and path.is_dir():
        return _open_folder(named["name"] if named else path.resolve().name, path)
    uri = ModelURI.parse(place)
    return ModelSource(name=named["name"] if named else Path(uri.path).name, model=resolve(uri))


def make_plan(config: EvaluationConfig, sources: Sequence[Source]) -> tuple[Asked, ...]:
    """The prompts and seeds that are evaluated.

    Prompts: the config's file, else those of the first folder among `sources`, else the sound world's. Seeds:
    the first folder's, else the config's.

    Raises `InvalidInputError` where a folder has other prompts, or not as many clips of each.
    """
    folders = [source for source in sources if isinstance(source, FolderSource)]
    world = world_prompts(config.world.count, config.world.split, config.sampling.duration)
    if config.prompts is not None:
        prompts = read_prompts(
            config.prompts,
            caption_column=config.caption_column,
            reference_column=config.reference_column,
            audio_root=config.audio_root,
        )
    elif folders:
        prompts = tuple(Prompt(text=text) for text in folders[0].clips)
    else:
        prompts = world
    # The judge needs to know what a prompt says, and of the sound world's it is known.
    known = {prompt.text: prompt for prompt in world}
    prompts = tuple(_informed(prompt, known.get(prompt.text)) for prompt in prompts)
    if not folders:
        numbers = range(config.first_seed, config.first_seed + config.seeds)
        return tuple(Asked(prompt=p, seed=clip_seed(p.text, number)) for p in prompts for number in numbers)
    for folder in folders:
        _check_prompts(folder, folders[0], [p.text for p in prompts], whole=config.prompts is None)
    return tuple(Asked(prompt=p, seed=seed) for p in prompts for seed, _ in folders[0].clips[p.text])


def clip_seed(text: str, number: int) -> int:
    """The seed of a prompt's clip `number`: other prompts get other noise, whatever stands beside them."""
    return int.from_bytes(hashlib.blake2b(f"{number}\n{text}".encode(), digest_size=4).digest())


def clips_of(source: Source, plan: Sequence[Asked], config: EvaluationConfig, cache: Path) -> Clips:
    """The files of `source`, generated into `cache` as far as they are not there yet.

    Raises `InvalidInputError` where the model refuses a prompt or a setting, `OutputError` where `cache`
    can't be written.
    """
    if isinstance(source, FolderSource):
        return _held(source, plan)
    if any(asked.seed is None for asked in plan):
        raise _invalid(f"have no seeds, so that {source.name} can't generate their like; compare two folders")
    settings = {"model": source.model.digest, "dtype": config.dtype, **asdict(config.sampling)}
    folder: ClipFolder[Asked] = ClipFolder(cache / digest_of(settings)[:16], lambda asked: [file_name(asked)])
    missing = folder.missing(plan)
    if missing:
        write_atomically(
            folder.folder / "settings.json", json.dumps({"name": source.name, **settings}, indent=1) + "\n"
        )
        _generate(source, missing, folder, config)
        gc.collect()  # the model goes before the next one comes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    files = tuple(folder.paths(asked)[0] for asked in plan)
    return Clips(name=source.name, files=files, identity=asdict(source.model.identity))


def options_of(asked: Asked, sampling: Sampling) -> GenerationOptions:
    """Return how a clip of the plan is generated: one WAV file of the model's rate."""
    return {
        "seed": asked.seed,
        "clip_count": 1,
        "duration": sampling.duration,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "scheduler": sampling.scheduler,
        "encoding": "wav",
    }


def _generate(
    source: ModelSource, missing: Sequence[Asked], folder: ClipFolder[Asked], config: EvaluationConfig
) -> None:
    """Make the missing clips, `config.batch` of them denoised together."""
    in_flight = 2 * config.batch
    # One shape of batch: a clip is the same whichever others are missing.
    engine = EngineConfig(batch_shapes=(config.batch,), exact=True, max_queue=max(64, in_flight))
    maker = open_clip_maker(source.model, device=config.device, dtype=config.dtype, config=engine)

    def make(asked: Asked) -> Generation:
        return maker.generate(asked.prompt.text, **options_of(asked, config.sampling))

    with closing(maker), progress(total=len(missing), desc=source.name, unit="clip") as bar:
        for _ in folder.make(missing, make, in_flight, stop=maker.close):
            bar.update()


def same_seeds(source: Source, plan: Sequence[Asked]) -> bool:
    """Whether the clips of `source` were made from the plan's seeds, as far as that is known."""
    if isinstance(source, ModelSource):
        return True
    held = {(text, seed) for text, clips in source.clips.items() for seed, _ in clips}
    return all((asked.prompt.text, asked.seed) in held for asked in plan)


def _held(source: FolderSource, plan: Sequence[Asked]) -> Clips:
    """A folder's files by prompt and seed; where the seeds are others, a prompt's clips in their order."""
    files: list[Path] = []
    for text, group in itertools.groupby(plan, lambda asked: asked.prompt.text):
        seeds = [asked.seed for asked in group]
        by_seed = dict(source.clips[text])
        paired = len(by_seed) == len(seeds) and set(by_seed) == set(seeds)
        files += [by_seed[seed] for seed in seeds] if paired else [path for _, path in source.clips[text]]
    return Clips(name=source.name, files=tuple(files), identity=source.identity)


def _open_folder(name: str, folder: Path) -> FolderSource:
    path = folder / INDEX
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        fields = ("captions", "location")
        if not rows or not all(isinstance(row.get(field), str) for row in rows for field in fields):
            raise ValueError("its lines must have captions and location")
    except (OSError, ValueError, AttributeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InvalidInputError(
            FieldViolation(
                "SOURCE",
                f"{path} can't be read: {reason}; give a folder that `milonga generate --prompts` wrote",
            )
        ) from error
    clips: dict[str, list[tuple[int | None, Path]]] = {}
    for row in rows:
        clips.setdefault(row["captions"], []).append((row.get("seed"), folder / row["location"]))
    models = {json.dumps(row.get("model"), sort_keys=True): row.get("model") for row in rows}
    model = next(iter(models.values())) if len(models) == 1 else None
    return FolderSource(name=name, clips=clips, identity=model if isinstance(model, dict) else {})


def _informed(prompt: Prompt, known: Prompt | None) -> Prompt:
    if known is None:
        return prompt
    return Prompt(text=prompt.text, truth=known.truth, reference=prompt.reference or known.reference)


def _check_prompts(folder: FolderSource, first: FolderSource, texts: Sequence[str], *, whole: bool) -> None:
    """Refuse a folder that has not the plan's prompts, or not as many clips of each as the first folder."""
    wanted = set(texts)
    missing = [text for text in texts if text not in folder.clips]
    foreign = [text for text in folder.clips if text not in wanted] if whole else []
    faults = [
        f"{folder.name} {what} {len(found)} of {len(texts)} prompts ({_listed(found)})"
        for what, found in (("lacks", missing), ("has besides", foreign))
        if found
    ]
    if faults:
        raise _invalid(f"differ: {', and '.join(faults)}; give clips of the same prompts")
    for text in texts:
        counts = [len(source.clips[text]) for source in (first, folder)]
        if counts[0] != counts[1]:
            raise _invalid(
                f"differ: {text!r} has {counts[0]} clips in {first.name}, {counts[1]} in {folder.name}; "
                "give as many of each"
            )


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(repr(text[:60]) for text in texts[:_LISTED]) + (", …" if len(texts) > _LISTED else "")


def file_name(asked: Asked) -> str:
    """Return the name of the file of a clip of the plan."""
    return f"{digest_of([asked.prompt.text, asked.seed])[:24]}.wav"


def _invalid(description: str) -> InvalidInputError:
    return InvalidInputError(FieldViolation("prompts", description))
