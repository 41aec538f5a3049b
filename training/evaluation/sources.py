"""Sources of the clips of an evaluation: a model that generates them, or a folder that contains them.

Generated clips are cached under the digest of the weights and the settings, one file per prompt and seed. So
an interrupted evaluation is resumed, and another one of the same model reuses them.
"""

import gc
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from services.api.generation import Generation, GenerationOptions
from services.clip_folder import ClipFolder
from services.engine import EngineConfig
from services.errors import InvalidInputError, invalid
from services.files import write_atomically
from services.lists import find_audio, read_list
from services.local import open_clip_maker
from services.weights.uri import EMBEDDED, ModelURI, ResolvedModel, resolve
from training.data.store import digest_of_value
from training.evaluation.config import EvaluationConfig, Sampling
from training.evaluation.prompts import Prompt, read_prompts, world_prompts
from training.loop.progress import progress

INDEX = "index.jsonl"
"""List of clips in a folder written by `milonga generate --prompts`."""
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<location>.+)")
_LISTED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """A prompt and seed, of which every source provides a clip. Metrics of two models are paired by it."""

    prompt: Prompt
    seed: int | None
    """None: unknown, for a clip from a folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that generates clips."""

    name: str
    model: ResolvedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """A folder of existing clips."""

    name: str
    clips: Mapping[str, Sequence[tuple[int | None, Path]]]
    """Seed (None: unknown) and file of the clips by prompt, in the order of the index."""
    identity: Mapping[str, Any]
    """The model that generated them, as far as it is known."""


Source = ModelSource | FolderSource


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceClips:
    """The clips of a source, in the order of the plan."""

    name: str
    files: tuple[Path, ...]
    identity: Mapping[str, Any]
    """Name, version, digest and license of the model, as far as they are known."""


def open_source(text: str) -> Source:
    """Open the source ``[NAME=]LOCATION``: a model URI, or the path of a folder of clips.

    Raises `InvalidInputError` if it is neither, `ModelError` if the model can't be loaded.
    """
    named = _NAMED.fullmatch(text)
    location = named["location"] if named else text
    path = Path(location).expanduser()
    if location.partition("#")[0] not in EMBEDDED and path.is_dir():
        return _open_folder(named["name"] if named else path.resolve().name, path)
    uri = ModelURI.parse(location)
    return ModelSource(name=named["name"] if named else Path(uri.path).name, model=resolve(uri))


def make_plan(config: EvaluationConfig, sources: Sequence[Source]) -> tuple[PlannedClip, ...]:
    """Return the prompts and seeds to evaluate.

    Prompts are those of the config's file, else of the first folder among `sources`, else of the sound world;
    seeds are those of the first folder, else of the config. Raises `InvalidInputError` if the folders differ
    in their prompts, or in the number of clips of a prompt.
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
    # The judge needs the events of a prompt, which are known for the sound world's.
    known = {prompt.text: prompt for prompt in world}
    prompts = tuple(_with_truth(prompt, known.get(prompt.text)) for prompt in prompts)
    if not folders:
        numbers = range(config.first_seed, config.first_seed + config.seeds)
        return tuple(PlannedClip(prompt=p, seed=clip_seed(p.text, n)) for p in prompts for n in numbers)
    for folder in folders:
        _check_prompts(folder, folders[0], [p.text for p in prompts], whole=config.prompts is None)
    return tuple(PlannedClip(prompt=p, seed=seed) for p in prompts for seed, _ in folders[0].clips[p.text])


def clip_seed(text: str, number: int) -> int:
    """Return the seed of clip `number` of a prompt, which depends on these two alone."""
    return int.from_bytes(hashlib.blake2b(f"{number}\n{text}".encode(), digest_size=4).digest())


def prepare_clips(
    source: Source, plan: Sequence[PlannedClip], config: EvaluationConfig, cache: Path
) -> SourceClips:
    """Return the clips of `source`; those of a model that are missing in `cache` are generated.

    Raises `InvalidInputError` if the model refuses a prompt or a setting, `OutputError` if `cache` can't be
    written.
    """
    if isinstance(source, FolderSource):
        return _folder_clips(source, plan)
    if any(planned.seed is None for planned in plan):
        raise _invalid(f"have no seeds, so {source.name} can't generate matching clips; compare two folders")
    settings = {"model": source.model.digest, "dtype": config.dtype, **asdict(config.sampling)}
    folder: ClipFolder[PlannedClip] = ClipFolder(
        cache / digest_of_value(settings)[:16], lambda planned: [file_name(planned)]
    )
    missing = folder.missing(plan)
    if missing:
        write_atomically(
            folder.folder / "settings.json", json.dumps({"name": source.name, **settings}, indent=1) + "\n"
        )
        _generate(source, missing, folder, config)
        gc.collect()  # free the model before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    files = tuple(folder.paths(planned)[0] for planned in plan)
    return SourceClips(name=source.name, files=files, identity=asdict(source.model.identity))


def generation_options(planned: PlannedClip, sampling: Sampling) -> GenerationOptions:
    """Return the options to generate a clip of the plan as one WAV file at the model's sampling rate."""
    return {
        "seed": planned.seed,
        "clip_count": 1,
        "duration": sampling.duration,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "scheduler": sampling.scheduler,
        "profile": sampling.profile,
        "encoding": "wav",
    }


def _generate(
    source: ModelSource,
    missing: Sequence[PlannedClip],
    folder: ClipFolder[PlannedClip],
    config: EvaluationConfig,
) -> None:
    """Generate the missing clips in batches of `config.batch`."""
    in_flight = 2 * config.batch
    # One batch shape, so that a clip does not depend on which others are missing.
    engine = EngineConfig(batch_shapes=(config.batch,), exact=True, max_queue=max(64, in_flight))
    maker = open_clip_maker(source.model, device=config.device, dtype=config.dtype, config=engine)

    def make(planned: PlannedClip) -> Generation:
        return maker.generate(planned.prompt.text, **generation_options(planned, config.sampling))

    with closing(maker), progress(total=len(missing), desc=source.name, unit="clip") as bar:
        for _ in folder.make(missing, make, in_flight, stop=maker.close):
            bar.update()


def same_seeds(source: Source, plan: Sequence[PlannedClip]) -> bool:
    """Return whether the clips of `source` have the seeds of the plan."""
    if isinstance(source, ModelSource):
        return True
    known = {(text, seed) for text, clips in source.clips.items() for seed, _ in clips}
    return all((planned.prompt.text, planned.seed) in known for planned in plan)


def _folder_clips(source: FolderSource, plan: Sequence[PlannedClip]) -> SourceClips:
    """Return the files of a folder by prompt and seed; if the seeds of a prompt differ, in their order."""
    files: list[Path] = []
    for text, group in itertools.groupby(plan, lambda planned: planned.prompt.text):
        seeds = [planned.seed for planned in group]
        by_seed = dict(source.clips[text])
        paired = len(by_seed) == len(seeds) and set(by_seed) == set(seeds)
        files += [by_seed[seed] for seed in seeds] if paired else [path for _, path in source.clips[text]]
    return SourceClips(name=source.name, files=tuple(files), identity=source.identity)


def _open_folder(name: str, folder: Path) -> FolderSource:
    path = folder / INDEX
    if not path.is_file():
        raise invalid(
            "SOURCE", f"{folder} has no {INDEX}; give a folder that `milonga generate --prompts` wrote"
        )
    entries = read_list(path, "SOURCE", clip="needed", checked=False)
    clips: dict[str, list[tuple[int | None, Path]]] = {}
    for entry in entries:
        clip = (entry.fields.get("seed"), find_audio(entry.location or "", folder))
        clips.setdefault(entry.prompt, []).append(clip)
    models = {json.dumps(entry.fields.get("model"), sort_keys=True) for entry in entries}
    model = entries[0].fields.get("model") if len(models) == 1 else None
    return FolderSource(name=name, clips=clips, identity=model if isinstance(model, dict) else {})


def _with_truth(prompt: Prompt, known: Prompt | None) -> Prompt:
    if known is None:
        return prompt
    return replace(prompt, truth=known.truth, reference=prompt.reference or known.reference)


def _check_prompts(folder: FolderSource, first: FolderSource, texts: Sequence[str], *, whole: bool) -> None:
    """Raise `InvalidInputError` unless `folder` has the prompts, each with as many clips as `first`."""
    planned = set(texts)
    missing = [text for text in texts if text not in folder.clips]
    extra = [text for text in folder.clips if text not in planned] if whole else []
    faults = [
        f"{folder.name} {what} {len(found)} of {len(texts)} prompts ({_listed(found)})"
        for what, found in (("lacks", missing), ("also has", extra))
        if found
    ]
    if faults:
        raise _invalid(f"differ: {', and '.join(faults)}; give clips of the same prompts")
    for text in texts:
        counts = [len(source.clips[text]) for source in (first, folder)]
        if counts[0] != counts[1]:
            raise _invalid(
                f"differ: {text!r} has {counts[0]} clips in {first.name}, {counts[1]} in {folder.name}; "
                "give as many in each folder"
            )


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(repr(text[:60]) for text in texts[:_LISTED]) + (", …" if len(texts) > _LISTED else "")


def file_name(planned: PlannedClip) -> str:
    """Return the file name of a clip of the plan."""
    return f"{digest_of_value([planned.prompt.text, planned.seed])[:24]}.wav"


def _invalid(description: str) -> InvalidInputError:
    return invalid("prompts", description)
