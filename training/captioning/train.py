"""Train a captioner as SLAM-AAC was trained: the projector and LoRA on a frozen encoder and language model.

    milonga train captioning --recipe mini
    milonga train captioning --recipe slam-aac-pretrain --set start=file:slam-aac --set data.train=all.jsonl
    milonga train captioning --recipe slam-aac-clotho --set start=file:build/captioning/pretrained …
    accelerate launch -m services.cli train captioning …

Loss is on the caption and its end; the weights with the lowest loss on the validation split are kept. Serve
the folder by `milonga serve captioning --model file:…`.

Shape legend: B batch, T mel frames, M mel bins.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn

from services.errors import InvalidInputError, invalid
from services.models.captioner.model import Captioner
from services.models.lora import LoraSettings
from services.weights.uri import ResolvedModel, resolve
from training.captioning.data import CaptionData, CaptionSplits, load_examples
from training.captioning.folder import REPORT, write_captioner
from training.data.captions import CaptionExample
from training.data.examples import Clip, check_prompts, check_readable, short_message
from training.data.scenes import paraphrase
from training.data.specaugment import SpecAugmentConfig, spec_augment
from training.data.store import batches
from training.loop.checks import Natural, Range, check_ranges
from training.loop.config import flatten
from training.loop.fit import Evaluation, LoopConfig, Positions, adamw, examples_at, fit, make_accelerator
from training.loop.progress import progress
from training.loop.run_folder import GROWING, check_output, claim_folder, finished_report

FREE: Final = ("loop.checkpoint_seconds", "loop.threads", "data.workers")
"""Settings that may differ when a run is resumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionerTraining:
    """Configuration of the training of a captioner."""

    name: str
    """Name of the model, in its manifest and as its folder."""
    start: str
    """URI of the captioner that is trained."""
    data: CaptionData
    loop: LoopConfig
    epochs: Annotated[float, Range(0, 10**6)] = 0.0
    """Passes over the data; above 0 they decide the number of steps, and `loop.steps` does not."""
    scratch: bool = False
    """Whether projector and adapters start anew from random weights, instead of the start's."""
    use_lora: bool = True
    """Whether the language model learns by adapters; otherwise only the projector learns."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """New adapters; a start that has some keeps its own, unless `scratch`."""
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    evaluate_every: Natural = 500
    """Steps between two losses on the validation split; 0: none, and the last weights are kept."""
    dtype: str = "float32"
    """Float type of the frozen language model: float32, bfloat16 or float16."""
    version: str = "1"
    """Version of the weights, in the manifest."""
    license: str = ""
    """Licence of the weights, in the manifest; empty: the start's."""

    def __post_init__(self) -> None:
        check_ranges(self)


class Learner(nn.Module):
    """A captioner whose state is only what learns: checkpoints hold no frozen language model."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, mels_BTM: Tensor, captions: Sequence[str]) -> tuple[Tensor, float, int]:
        """Return the loss, the share of tokens that are predicted, and their number."""
        output = self.captioner(mels_BTM, captions)
        return output.loss, output.accuracy, int((output.labels_BL >= 0).sum())

    def train(self, mode: bool = True) -> "Learner":
        """Set the mode of all but the frozen encoder, which stays in evaluation mode."""
        super().train(mode)
        self.captioner.encoder.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the parameters that learn."""
        learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if name in learning}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what `state_dict` returned. Raises RuntimeError if other parameters learn."""
        if strict and (differing := sorted(state_dict.keys() ^ self.state_dict().keys())):
            raise RuntimeError(f"the state is of other parameters: {', '.join(differing[:3])}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def train_captioner(config: CaptionerTraining, output: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Train a captioner, write its folder `output`, and return the content of its training.json.

    Processes other than the main one return {}. Next to `output`, ``NAME.run`` has the journal and the
    checkpoints. An interrupted training is resumed by the same call; with `fresh` it starts over.

    Raises:
        InvalidInputError: settings or data are invalid, or an existing run has other settings.
        ModelError: the start is no captioner.
        OutputError: `output` can't be written, or holds something else.
    """
    check_output(output, REPORT)
    accelerator = make_accelerator(config.loop)
    main, run = accelerator.is_main_process, output.with_name(f"{output.name}.run")
    start, sources = resolve(config.start), config.data.digests()
    settings = flatten(config) | {"start_digest": start.digest, "data_digests": tuple(sources.values())}
    kept = {name: value for name, value in settings.items() if name not in FREE}
    with accelerator.main_process_first():
        claim_folder(run, settings, fresh=fresh and main, free=(*FREE, GROWING))
    if not fresh and (finished := finished_report(output / REPORT, kept)) is not None:
        return finished if main else {}

    captioner = load_learner(config, start).captioner.to(accelerator.device)
    learner, unusable = Learner(captioner), dict[str, str]()
    with ThreadPoolExecutor(config.data.workers) as threads:
        mels = Mels(captioner, threads, config.data.cached)
        splits, unreadable = readable_examples(config, mels, accelerator, unusable)
        loop = loop_of(config, len(splits.train))
        measure = partial(evaluate, examples=splits.validation, mels=mels, batch=loop.batch)
        before = measure(learner.eval()) if config.evaluate_every else {}
        fitted = fit(
            learner,
            adamw(learner, loop),
            partial(loss_of, config=config, examples=splits.train, mels=mels),
            loop,
            run,
            accelerator=accelerator,
            title=f"captioner {config.name}",
            evaluation=Evaluation(
                run=measure,
                every=config.evaluate_every,
                watched="log_likelihood",
            )
            if config.evaluate_every
            else None,
        )
        figures = measure(learner.eval())
    report: dict[str, Any] = {}
    if main:
        report = {
            "stage": "captioning",
            "parent": {
                "name": start.identity.name,
                "version": start.identity.version,
                "digest": start.digest,
            },
            "data": {
                "files": {Path(path).name: digest for path, digest in sources.items()},
                "train": len(splits.train),
                "validation": len(splits.validation),
                "unreadable": {clip.name: reason for clip, reason in unreadable.items()},
                "unusable_captions": unusable,
            },
            "parameters": {
                "learn": sum(p.numel() for p in learner.parameters() if p.requires_grad),
                "all": sum(p.numel() for p in learner.parameters()),
            },
            "steps": fitted.steps,
            "best_step": fitted.best_step,
            "figures": figures,
            "figures_before": before,
            "settings": kept,
        }
        license = config.license or start.identity.license
        write_captioner(
            captioner, start.folder, output, report, name=config.name, version=config.version, license=license
        )
    accelerator.wait_for_everyone()
    return report


def load_learner(config: CaptionerTraining, start: ResolvedModel) -> Learner:
    """Load the start and choose what learns. Raises `ModelError` or `InvalidInputError`."""
    captioner = Captioner.from_pretrained(start.folder, dtype=config.dtype, merge=config.scratch)
    torch.manual_seed(config.loop.seed)
    if config.scratch:
        # The start's own adapters, merged above, would be part of the language model.
        if (start.folder / "adapter").is_dir():
            raise invalid("scratch", f"is true, but {start.identity.name} has adapters; give a start without")
        for layer in (captioner.projector.linear1, captioner.projector.linear2):
            layer.reset_parameters()
    captioner.prepare_training(config.lora if config.use_lora else None)
    return Learner(captioner)


def loop_of(config: CaptionerTraining, examples: int) -> LoopConfig:
    """Return the loop's settings, with the number of steps of the epochs."""
    if not config.epochs:
        return config.loop
    return replace(config.loop, steps=max(1, math.ceil(config.epochs * examples / config.loop.batch)))


def loss_of(
    learner: nn.Module,
    positions: Positions,
    *,
    config: CaptionerTraining,
    examples: Sequence[CaptionExample],
    mels: "Mels",
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of the captions of the examples at `positions`, and accuracy; mels get stripes."""
    seed = config.loop.seed
    picked = [examples[index] for index in examples_at(positions, len(examples), seed)]
    mels_BTM = spec_augment(
        mels.of([example.clip for example in picked]),
        config.spec_augment,
        [(seed, position) for position in positions.tolist()],
    )
    captions = [worded(e, seed, position) for e, position in zip(picked, positions.tolist(), strict=True)]
    loss, accuracy, _ = learner(mels_BTM, captions)
    return loss, {"accuracy": accuracy}


def worded(example: CaptionExample, seed: int, position: int) -> str:
    """Return the caption, or if the clip's events are known, another wording from the training split."""
    if example.truth is None:
        return example.caption
    return paraphrase(example.truth, np.random.default_rng([seed, position]), "train") or example.caption


@torch.no_grad()
def evaluate(
    learner: nn.Module, *, examples: Sequence[CaptionExample], mels: "Mels", batch: int
) -> dict[str, float]:
    """Return loss and accuracy over all tokens of the examples, and `log_likelihood`, the negative loss."""
    loss = accuracy = 0.0
    tokens = 0
    for part in batches(examples, batch):
        found = learner(mels.of([example.clip for example in part]), [example.caption for example in part])
        loss, accuracy = loss + float(found[0]) * found[2], accuracy + found[1] * found[2]
        tokens += found[2]
    return {
        "validation_loss": loss / tokens,
        "validation_accuracy": accuracy / tokens,
        "log_likelihood": -loss / tokens,
    }


class Mels:
    """The mels of clips, as the captioner makes them; those used last stay in memory."""

    def __init__(self, captioner: Captioner, threads: ThreadPoolExecutor, kept: int) -> None:
        self.captioner, self.threads = captioner, threads
        self._mel: Callable[[Clip], Tensor] = functools.lru_cache(maxsize=kept)(self._compute)

    def of(self, clips: Sequence[Clip]) -> Tensor:
        """Return normalised mels [B, T, M] on the captioner's device. Raises as `fault` describes."""
        return torch.stack(list(self.threads.map(self._mel, clips))).to(self.captioner.device).float()

    def faults(self, clips: Sequence[Clip]) -> Iterator[str | None]:
        """Yield for each clip why it can't be used; None if it can."""
        return self.threads.map(self._fault, clips)

    def _fault(self, clip: Clip) -> str | None:
        try:
            self._mel(clip)
        except (OSError, ValueError) as error:
            return short_message(error)
        except InvalidInputError as error:
            return "; ".join(violation.description for violation in error.violations)
        return None

    def _compute(self, clip: Clip) -> Tensor:
        prepared = self.captioner.prepare(*clip.read())
        if not prepared.waveform_N.any():
            raise ValueError("is silent")
        return self.captioner.mel(prepared).half().cpu()


def readable_examples(
    config: CaptionerTraining, mels: Mels, accelerator: Accelerator, unusable: dict[str, str]
) -> tuple[CaptionSplits, dict[Clip, str]]:
    """Read every clip once, divided among the processes; return the usable examples, and why clips are not.

    `unusable` gets the rows that are left out for their captions. Raises `InvalidInputError` if too many
    clips or captions are unusable.
    """
    data, quiet = config.data, not accelerator.is_main_process
    splits = load_examples(data, unusable)
    check_prompts(unusable, len(splits.train) + len(splits.validation), data.max_unreadable, quiet=quiet)
    clips = splits.clips()
    own = range(accelerator.process_index, len(clips), accelerator.num_processes)
    faults = progress(
        mels.faults([clips[i] for i in own]), total=len(own), desc="clips", unit="clip", disable=quiet
    )
    found = {number: fault for number, fault in zip(own, faults, strict=True) if fault is not None}
    if accelerator.num_processes > 1:
        found = {number: fault for part in gather_object([found]) for number, fault in part.items()}
    unreadable = {clips[number]: fault for number, fault in sorted(found.items())}
    check_readable(unreadable, len(clips), data.max_unreadable, quiet=quiet)
    splits = splits.without(set(unreadable))
    if not (splits.train and splits.validation):
        raise invalid("data", f"has no example left: {len(unreadable)} of {len(clips)} clips can't be read")
    return splits, unreadable
