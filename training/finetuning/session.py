"""The common parts of supervised fine-tuning, DPO and BATON: the denoiser in training, its data, its folder.

Only the denoiser learns, all of it or low-rank adapters on it. All other parts are the start's, file for
file. How a family's clips are noised and its errors measured is its `Objective`.

Shape legend: B batch, X a family's own shape of latents.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

from services.errors import MilongaError, invalid
from services.files import sha256_of
from services.models.architectures import architecture_of
from services.models.folders import DTYPES, read_json
from services.models.latent import Conditioning
from services.models.manifest import ADAPTER_CONFIG, MANIFEST_NAME, Manifest, write_manifest
from services.models.pipelines import Architecture, Denoise
from services.models.state_dicts import quiet_loading
from services.models.writing import replaced_folder
from services.weights.uri import ResolvedModel, resolve
from training.data.content import report_content
from training.data.examples import Clip, Pair, check_prompts, check_readable, read_pairs
from training.data.latents import LatentConfig, Latents
from training.data.prompts import HasPrompt, places_of, report_prompts
from training.finetuning.adapters import adapter_folder, write_adapters
from training.loop.checks import Range, Share, check_ranges
from training.loop.config import Plain, flatten
from training.loop.fit import LoopConfig, Positions, make_accelerator
from training.loop.run_folder import (
    GROWING,
    JOURNAL,
    check_output,
    claim_folder,
    finished_report,
    read_journal,
)
from training.objectives.noising import Noising, NoisingConfig, draw_noising, mean_products, residuals
from training.objectives.objective import OBJECTIVES, Objective

TRAINING = "training.json"
"""File of a model folder with the report of its training."""
FREE = ("loop.checkpoint_seconds", "loop.threads", "latents.cache")
"""Settings that may differ when a run is resumed."""

Changes = Mapping[str, Mapping[str, Any]]
"""Entries of JSON files of a model folder, by the file's path in it."""

Example = TypeVar("Example")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on the denoiser's weights, which are then frozen."""

    rank: Annotated[int, Range(0, 4096)] = 0
    """Rank of the adapters; 0: no adapters, the denoiser itself learns."""
    alpha: Annotated[int, Range(0, 10**6)] = 0
    """Numerator of the adapters' scale, alpha / rank; 0: the rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the layers that get an adapter: those of the attention."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuning:
    """The settings of every training of a denoiser."""

    name: str
    """Name of the model, in its manifest and of its folder."""
    loop: LoopConfig
    start: str = "mini-base"
    """URI of the model whose denoiser is trained."""
    epochs: Annotated[float, Range(0, 10**6)] = 0.0
    """Passes over the data; above 0 they decide the number of steps, and `loop.steps` does not."""
    noising: NoisingConfig = field(default_factory=NoisingConfig)
    latents: LatentConfig = field(default_factory=LatentConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time."""
    weights: Literal["float32", "float16"] = "float32"
    """Number format of the stored denoiser. float16 rounds away the changes of a small learning rate."""
    version: str = "1"
    """Version of the weights, for the manifest."""
    license: str | None = None
    """Licence of the weights, for the manifest; none: the start's."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairData:
    """The source of preference pairs."""

    pairs: tuple[Path, ...] = ()
    """Parquet files with audio-alpaca's columns (`training.data.examples.read_pairs`), or folders of them."""
    audio_root: Path | None = None
    """Folder that relative paths of audio start from; none: each Parquet file's own folder."""
    max_unreadable: Share = 0.05
    """Share of clips that may be unreadable before the training is refused."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def files(self) -> tuple[Path, ...]:
        """Return the Parquet files. Raises `InvalidInputError` if there is none."""
        if not self.pairs:
            raise invalid(
                "data.pairs", "is empty; give Parquet files with the columns prompt, chosen and rejected"
            )
        return parquet_files(self.pairs)

    def read(self, unusable: dict[str, str] | None = None) -> list[Pair]:
        """Return every pair; clips are not read yet. `unusable` is as in `read_pairs`.

        Raises `InvalidInputError` if there is no pair.
        """
        return [
            pair for path in self.files() for pair in read_pairs(path, self.audio_root, unusable=unusable)
        ]


class Predictions(NamedTuple):
    """Predictions of denoisers for one batch."""

    policy_BX: Tensor
    reference_BX: Tensor | None
    """The reference's prediction, without gradients."""


class Errors(NamedTuple):
    """Denoising errors of one batch."""

    policy_B: Tensor
    reference_B: Tensor | None
    """The reference's, if there is one."""
    residuals_BX: Tensor
    """The policy's predictions minus their targets, without gradients."""


class Policy(nn.Module):
    """The denoiser in training, and the reference that it is compared with, if there is one.

    The reference of adapters is the denoiser without them, so no second copy is kept. The state of the
    module, which checkpoints and averages hold, is the parameters that learn and nothing else.
    """

    denoiser: Any
    """A diffusers model, which may have adapters."""

    def __init__(
        self, denoiser: Any, reference: nn.Module | None, denoise: Denoise, *, adapters_off: bool = False
    ) -> None:
        """Hold the models that `denoise` calls.

        `adapters_off`: the reference is `denoiser` without its adapters.
        """
        super().__init__()
        self.denoiser, self.reference = denoiser, reference
        self.denoise, self.adapters_off = denoise, adapters_off
        if self.reference is not None:
            self.reference.eval().requires_grad_(False)
        self.learned = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        """Names of the parameters that learn."""

    def forward(
        self,
        noisy_BX: Tensor,
        timesteps_B: Tensor,
        conditioning: Conditioning,
        seconds_B: Tensor,
        jumps_B2: Tensor | None = None,
    ) -> Predictions:
        """Return predictions. The reference's is computed first, and its activations are freed at once."""
        inputs = (noisy_BX, timesteps_B, conditioning, seconds_B, jumps_B2)
        reference_BX = None
        if self.adapters_off:
            self.denoiser.disable_adapters()
            try:
                with torch.no_grad():
                    reference_BX = self.denoise(self.denoiser, *inputs)
            finally:
                self.denoiser.enable_adapters()
        elif self.reference is not None:
            with torch.no_grad():
                reference_BX = self.denoise(self.reference, *inputs)
        return Predictions(self.denoise(self.denoiser, *inputs), reference_BX)

    def train(self, mode: bool = True) -> "Policy":
        """Set the mode; the reference stays in evaluation mode."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the parameters that learn."""
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in self.learned}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the parameters that `state_dict` returned."""
        if state_dict.keys() != self.learned:
            differing = sorted(state_dict.keys() ^ self.learned)
            raise MilongaError(f"the checkpoint is of another denoiser: {', '.join(differing[:3])} …")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def counts(self) -> dict[str, int]:
        """Return the number of the denoiser's parameters, adapters included, and of those that learn."""
        learn = sum(p.numel() for name, p in self.named_parameters() if name in self.learned)
        return {"all": sum(p.numel() for p in self.denoiser.parameters()), "learn": learn}

    def merged(self) -> Any:
        """Return the denoiser as it is served: adapters, if any, merged into its weights."""
        if any("lora_" in name for name in self.learned):
            self.denoiser.fuse_lora()
            self.denoiser.unload_lora()
        return self.denoiser


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """The state that the training programs share: config, folders, models, data and objective."""

    config: FineTuning
    output: Path
    run: Path
    """Folder of journal and checkpoints."""
    start: ResolvedModel
    models: Mapping[str, ResolvedModel]
    """Further models, by the names of their settings."""
    accelerator: Accelerator
    latents: Latents
    objective: Objective
    """The objective of the start's family."""
    settings: Mapping[str, Plain]
    """All settings and digests that determine the result."""
    sources: Mapping[str, str]
    """Digests of the data's files, by path."""

    def noising(self, positions: Positions, clean_BX: Tensor, batch: int, stream: int = 0) -> Noising:
        """Draw the noising of the examples at `positions`, for latents of the shape of `clean_BX`."""
        return draw_noising(
            positions,
            tuple(clean_BX.shape[1:]),
            self.config.noising,
            batch=batch,
            seed=self.config.loop.seed,
            continuous=self.objective.continuous,
            stream=stream,
        )


def open_session(
    config: FineTuning,
    output: Path,
    files: Iterable[Path],
    models: Mapping[str, str | None],
    *,
    fresh: bool,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Session, dict[str, Any] | None]:
    """Claim the run's folder and find the start; return the report too, if the run is already finished.

    Args:
        config: config of the program.
        output: the model's folder; ``NAME.run`` is next to it.
        files: the data's files, to whose content the run is bound.
        models: URIs of further models that affect the result, by the names of their settings.
        fresh: start over.
        digests: digests of further inputs, by name.

    Raises:
        InvalidInputError: settings are wrong, or the existing run has others.
        ModelError: the start is no generator, or predicts what its family can't be trained for.
        OutputError: `output` can't be written, or holds something else.
    """
    check_output(output, TRAINING)
    if config.lora.rank:
        check_output(adapter_folder(output), ADAPTER_CONFIG)
    accelerator = make_accelerator(config.loop)
    run = output.with_name(f"{output.name}.run")
    start = resolve(config.start)
    architecture = architecture_of(start.folder)
    architecture.check(start.folder)
    if architecture.objective is None:
        family = architecture.pipeline.__name__
        raise invalid(
            "start", f"is a language model ({family}), which can't be fine-tuned; give Tango or TangoFlux"
        )
    if architecture.folds_guidance(start.folder):
        raise invalid("start", "is a distilled model; train the model that it was distilled from")
    objective = OBJECTIVES[architecture.objective](start.folder)
    try:
        sources = {str(path): sha256_of(path) for path in files}
    except OSError as error:
        raise invalid("data", f"{error.filename} can't be read: {error.strerror}") from error
    inputs: dict[str, Plain] = {"start_digest": start.digest, "data_digests": tuple(sources.values())}
    found = {name: resolve(uri) for name, uri in models.items() if uri}
    inputs |= {f"{name}_digest": found[name].digest if name in found else None for name in models}
    settings = flatten(config) | inputs | {**digests}
    with accelerator.main_process_first():
        claim_folder(run, settings, fresh=fresh and accelerator.is_main_process, free=(*FREE, GROWING))
    kept = {name: value for name, value in settings.items() if name not in FREE}
    session = Session(
        config=config,
        output=output,
        run=run,
        start=start,
        models=found,
        accelerator=accelerator,
        latents=Latents(config.latents.cache or run, start.folder, config.latents, accelerator),
        objective=objective,
        settings=kept,
        sources=sources,
    )
    return session, None if fresh else finished_report(output / TRAINING, kept)


def build_policy(config: FineTuning, start: ResolvedModel, reference: ResolvedModel | None = None) -> Policy:
    """Return the start's denoiser, prepared for training, with a reference if one is given.

    Raises:
        InvalidInputError: the reference has another architecture, or adapters fit no layer.
        ModelError: a folder holds no denoiser.
    """
    architecture = architecture_of(start.folder)
    architecture.check(start.folder)
    assert architecture.denoise is not None  # see `open_session`
    denoiser: Any = architecture.load_denoiser(start.folder)
    copy = None
    if reference is not None and config.lora.rank and reference.digest != start.digest:
        raise invalid(
            "reference", "is another model than start; that of adapters is their start, so leave it out"
        )
    if reference is not None:
        check_architecture(architecture, start, reference)
        copy = None if config.lora.rank else architecture.load_denoiser(reference.folder)
    if config.lora.rank:
        torch.manual_seed(config.loop.seed)
        denoiser.requires_grad_(False)
        add_adapters(denoiser, config.lora)
    else:
        denoiser.requires_grad_(True)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    adapters_off = reference is not None and config.lora.rank > 0
    return Policy(denoiser, copy, architecture.denoise, adapters_off=adapters_off)


def check_architecture(architecture: Architecture, start: ResolvedModel, reference: ResolvedModel) -> None:
    """Raise `InvalidInputError` unless `reference` is of the start's architecture and reads its latents.

    Raises `ModelError` if `reference` is no generator.
    """
    other = architecture_of(reference.folder)
    if other is not architecture:
        raise invalid(
            "reference",
            f"{reference.identity.name} is a {other.pipeline.__name__}, and the start {start.identity.name} "
            f"a {architecture.pipeline.__name__}; give the model that the start came from",
        )
    architecture.check(reference.folder)
    for part in (architecture.denoiser, *architecture.encoders):
        ours, theirs = (
            {
                name: value
                for name, value in read_json(model.folder / part / "config.json").items()
                if not name.startswith("_")
            }
            for model in (start, reference)
        )
        differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if differing:
            name = differing[0]
            raise invalid(
                "reference",
                f"{reference.identity.name} has another architecture than the start "
                f"{start.identity.name} ({part}.{name} is "
                f"{theirs.get(name)}, not {ours.get(name)}); give the model that the start came from",
            )


def add_adapters(denoiser: Any, config: LoraConfig) -> None:
    """Add adapters to the layers of `config`; only they learn. At first they change nothing."""
    from peft import LoraConfig as Adapters

    adapters = Adapters(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        target_modules=list(config.targets),
        lora_dropout=0.0,
    )
    try:
        denoiser.add_adapter(adapters)
    except ValueError as error:
        raise invalid("lora.targets", f"is {','.join(config.targets)}, which fits no layer") from error


def loop_of(config: FineTuning, examples: int) -> LoopConfig:
    """Return the loop's settings, with the number of steps of the epochs."""
    if not config.epochs:
        return config.loop
    return replace(config.loop, steps=max(1, math.ceil(config.epochs * examples / config.loop.batch)))


def readable(
    examples: Sequence[Example],
    clips_of: Callable[[Example], Sequence[Clip]],
    prompt_of: Callable[[Example], str],
    session: Session,
    limit: float,
    unusable: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Example], dict[Clip, str]]:
    """Encode the examples; return those whose clips can be read, and the unreadable clips with the reason.

    `unusable` has the rows that were left out for their prompts. Raises `InvalidInputError` if their share or
    that of unreadable clips exceeds `limit`, or no example is left.
    """
    quiet = not session.accelerator.is_main_process
    check_prompts(unusable, len(examples), limit, quiet=quiet)
    clips = dict.fromkeys(clip for example in examples for clip in clips_of(example))
    unreadable = session.latents.add(clips, map(prompt_of, examples))
    check_readable(unreadable, len(clips), limit, quiet=quiet)
    left = [example for example in examples if not any(clip in unreadable for clip in clips_of(example))]
    if not left:
        raise invalid("data", f"no example is left: {len(unreadable)} of {len(clips)} clips can't be read")
    return left, unreadable


def report_data(
    examples: Iterable[HasPrompt], pairs: Sequence[tuple[Clip, Clip | None]], session: Session
) -> dict[str, Any]:
    """Return the entries of the report on prompts and clips that may be wrong, and print warnings.

    `examples` have the prompts; `pairs` are as in `report_content`.
    """
    folder, accelerator = session.start.folder, session.accelerator
    reader = architecture_of(folder).prompt_reader(folder)
    name, quiet = session.start.identity.name, not accelerator.is_main_process
    prompts = report_prompts(places_of(examples), reader, name, quiet=quiet)
    return prompts | report_content(pairs, accelerator)


def errors_of(
    policy: nn.Module, clean_BX: Tensor, prompts: Sequence[str], noising: Noising, session: Session
) -> Errors:
    """Return denoising errors: the mean square of each prediction's difference from its target."""
    noising, objective = noising.to(clean_BX.device), session.objective
    dropped = noising.unconditional_B.tolist()
    conditioning = session.latents.text(
        ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
    )
    noisy_BX = objective.noised(clean_BX, noising)
    seconds_B = torch.full((len(clean_BX),), session.latents.seconds, device=clean_BX.device)
    predicted: Predictions = policy(noisy_BX, noising.timesteps_B, conditioning, seconds_B)
    target_BX = objective.target(clean_BX, noising)
    ours_BX, reference_B = residuals(predicted.policy_BX, target_BX), None
    if predicted.reference_BX is not None:
        theirs_BX = residuals(predicted.reference_BX, target_BX)
        reference_B = mean_products(theirs_BX, theirs_BX)
    return Errors(mean_products(ours_BX, ours_BX), reference_B, ours_BX.detach())


def finish_session(
    session: Session,
    policy: Policy,
    stage: str,
    steps: int,
    data: Mapping[str, Any],
    changes: Changes = MappingProxyType({}),
) -> dict[str, Any]:
    """Write the model's folder from the main process; return the report, which is its training.json.

    `changes` are of its JSON files, see `write_pipeline`.
    """
    config, start = session.config, session.start
    report: dict[str, Any] = {
        "stage": stage,
        "parent": {
            "name": start.identity.name,
            "version": start.identity.version,
            "digest": start.digest,
        },
        "data": {"files": {Path(p).name: digest for p, digest in session.sources.items()}, **data},
        "parameters": policy.counts(),
        "steps": steps,
        "figures": last_figures(session.run / JOURNAL),
        "settings": dict(session.settings),
    }
    if session.accelerator.is_main_process:
        if config.lora.rank:
            write_adapters(
                policy.denoiser,
                adapter_folder(session.output),
                config.start,
                start,
                name=f"{config.name}-adapter",
                version=config.version,
                license=config.license or start.identity.license,
            )
        write_pipeline(
            policy.merged(),
            start,
            session.output,
            report,
            dtype=config.weights,
            name=config.name,
            version=config.version,
            license=config.license or start.identity.license,
            changes=changes,
        )
    session.accelerator.wait_for_everyone()
    return report


def last_figures(journal: Path, share: float = 0.1) -> dict[str, float]:
    """Return the means of the journal's figures over the last part of a training, without times."""
    rows = [row for row in read_journal(journal) if "loss" in row]
    last = rows[-max(1, round(share * len(rows))) :]
    timed = ("step", "seconds", "samples_per_second", "time")
    names = [name for name in last[-1] if name not in timed] if last else []
    return {name: sum(row[name] for row in last) / len(last) for name in names}


def write_pipeline(
    denoiser: Any,
    start: ResolvedModel,
    output: Path,
    report: Mapping[str, Any],
    *,
    dtype: str,
    name: str,
    version: str,
    license: str,
    changes: Changes = MappingProxyType({}),
) -> Manifest:
    """Write the start's folder with another denoiser, under a temporary name, then put it in place.

    The parts that did not learn are copied, file for file; `changes` are entries of JSON files that differ
    from the start's. Raises `OutputError`; an existing folder is then unchanged.
    """
    architecture = architecture_of(start.folder)
    part = architecture.denoiser
    left_out = shutil.ignore_patterns(part, MANIFEST_NAME, TRAINING, "*.md", ".*")
    with replaced_folder(output) as temporary:
        shutil.copytree(start.folder, temporary, ignore=left_out, dirs_exist_ok=True)
        with quiet_loading():
            denoiser.to(DTYPES[dtype]).save_pretrained(temporary / part, safe_serialization=True)
        # The start's own config for the same architecture, without the paths that the library adds.
        shutil.copyfile(start.folder / part / "config.json", temporary / part / "config.json")
        for name_of_file, entries in changes.items():
            path = temporary / name_of_file
            content = json.dumps(read_json(path) | dict(entries), indent=2, sort_keys=True) + "\n"
            path.unlink()  # a copy may be read-only
            path.write_text(content, encoding="utf-8")
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        (temporary / TRAINING).write_text(text, encoding="utf-8")
        manifest = write_manifest(temporary, name=name, version=version, license=license)
        (temporary / "README.md").write_text(_card(manifest, report, architecture.tags), encoding="utf-8")
    return manifest


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return the report as lines of text."""
    parameters, data = report["parameters"], report["data"]
    figures = ", ".join(f"{name} {value:.4g}" for name, value in report["figures"].items())
    return [
        f"{report['stage']} from {report['parent']['name']} {report['parent']['version']}: {report['steps']} "
        f"steps on {data['examples']} examples, {parameters['learn']:,} of {parameters['all']:,} parameters",
        f"at the end: {figures}",
        *_about_recordings(data),
    ]


def _about_recordings(data: Mapping[str, Any]) -> list[str]:
    """Return lines on recordings that were learned, and on those that were held out."""
    lines = []
    if "recordings" in data:
        licences = ", ".join(data["licences"]) or "not stated"
        authors = f"; authors: {', '.join(data['authors'])}" if data["authors"] else ""
        count = f"{data['recordings']} recordings of {data['source']}"
        lines.append(f"data: {count}; licences: {licences}{authors}")
    if held := data.get("held_out"):
        lines.append(
            f"denoising error of {held['clips']} held-out clips: {held['error_before']:.4f} before, "
            f"{held['error_after']:.4f} after"
        )
    return lines


def parquet_files(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Return files, and the Parquet files in folders. Raises `InvalidInputError` for an empty folder."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not inside:
            raise invalid("data.pairs", f"{path} holds no Parquet file; give a data set's folder or file")
        found += inside
    return tuple(found)


def _card(manifest: Manifest, report: Mapping[str, Any], tags: Sequence[str]) -> str:
    """Return the model card."""
    lines = "\n".join(f"    {line}" for line in summary(report))
    parent = report["parent"]
    return f"""---
license: {manifest.license.lower()}
library_name: diffusers
pipeline_tag: text-to-audio
tags: [{", ".join(("text-to-audio", *tags, "preference-optimization"))}]
---

# {manifest.name}

Version {manifest.version}, `{manifest.digest}`: `{parent["name"]}` {parent["version"]}
(`{parent["digest"]}`) after {report["stage"]}. Only the denoiser differs.

    milonga serve generation --model file:THIS-FOLDER

{lines}

All figures, settings and training data: `{TRAINING}`.
"""
