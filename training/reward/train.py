"""Train a reward model: a head on a frozen CLAP model, from labels, from pairs, or from both.

    milonga train reward --recipe mini
    milonga train reward --recipe baton --set data.labelled=HD.json --set data.audio_root=data/Audio
    accelerate launch -m services.cli train reward --recipe baton …

The validation split of the prompts decides when to stop, which weights to keep, and the calibration; metrics
are computed on the test split. Serve the resulting folder by `milonga serve reward --model file:…`.

Shape legend: B batch.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from services.errors import invalid
from services.models.clap.model import ClapModel
from services.models.reward.model import WEIGHTS_NAME, RewardConfig, RewardModel, read_reward_config
from services.models.state_dicts import check_finite, check_weights
from services.weights.loading import load_clap_model
from services.weights.uri import ResolvedModel, resolve
from training.data.content import report_content
from training.data.examples import Clip, Examples, LabelledClip, Pair, check_readable, counts
from training.data.prompts import places_of, report_prompts
from training.data.scenes import SPLITS, UNREAD, paraphrase
from training.loop.checks import Count, ErrorRate, Factor, Natural, Range, check_ranges
from training.loop.config import flatten
from training.loop.fit import (
    Evaluation,
    LoopConfig,
    Positions,
    adamw,
    examples_at,
    fit,
    make_accelerator,
)
from training.loop.run_folder import GROWING, claim_folder, finished_report
from training.objectives.calibration import fit_scaling
from training.objectives.preference import binary_cross_entropy, bradley_terry
from training.reward.data import ClapTokens, DataConfig, load_examples
from training.reward.report import (
    EVALUATION,
    check_output,
    evaluate_head,
    evaluation_report,
    reliability_plot,
    write_model,
)
from training.soundworld.scenes import Split

FREE = ("loop.checkpoint_seconds", "loop.threads", "data.workers")
"""Settings that may change when a run is resumed."""


Size = Annotated[int, Range(1, 2**16)]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """Sizes of the head, as in `services.models.reward.model.RewardConfig`."""

    width: Size = 96
    """Width of the head's tokens."""
    heads: Size = 4
    """Attention heads."""
    layers: Annotated[int, Range(1, 1000)] = 2
    """Layers of self-attention among the text tokens and cross-attention to the clip."""
    feedforward: Size = 192
    """Hidden width of the layers' feed-forward part."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.1
    """Dropout probability during training."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, must be a multiple of heads ({self.heads})")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTraining:
    """Configuration of the training of a reward model."""

    name: str
    """Name of the model, in its manifest and as its folder."""
    clap: str
    """URI of the CLAP model that the head is built on."""
    objective: Literal["bce", "bradley_terry", "both"]
    """Loss: binary cross-entropy on labels (BATON), Bradley-Terry likelihood on pairs, or their sum."""
    data: DataConfig
    loop: LoopConfig
    head: HeadConfig = field(default_factory=HeadConfig)
    init: Path | None = None
    """Folder of a reward model to start from; its sizes must be those of `head`, and its CLAP model this one
    or an earlier state of it. None: a random head."""
    label_smoothing: ErrorRate = 0.0
    """Assumed error rate of the annotators, for either objective."""
    class_weights: tuple[Factor, Factor] = (1.0, 1.0)
    """Weights of the labels 0 and 1 in the cross-entropy."""
    evaluate_every: Count = 100
    """Steps between two evaluations on the validation split."""
    patience: Natural = 5
    """Evaluations without an improvement after which training stops early; 0: never."""
    version: str = "1"
    """Version of the weights, in the manifest."""
    license: str = "Apache-2.0"
    """License of the weights, in the manifest."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not any(self.class_weights):
            raise ValueError(f"class_weights is {self.class_weights}, and one at least must be above 0")


def train_reward(config: RewardTraining, output: Path, *, fresh: bool = False) -> dict[str, Any]:
    """Train a reward model, write its folder `output`, and return the content of its evaluation.json.

    Processes other than the main one return {}. Next to `output`, ``NAME.run`` contains the journal,
    the checkpoints and CLAP's tokens. An interrupted training is resumed by the same call; with `fresh` it
    starts over.

    Raises:
        InvalidInputError: settings or data are invalid, or an existing run has other settings.
        ModelError: the CLAP model can't be loaded.
        OutputError: `output` can't be written, or contains anything but a reward model.
    """
    check_output(output)
    accelerator = make_accelerator(config.loop)
    main, run = accelerator.is_main_process, output.with_name(f"{output.name}.run")
    resolved = resolve(config.clap)
    with accelerator.main_process_first():
        settings = flatten(config) | {"clap_digest": resolved.digest}
        claim_folder(run, settings, fresh=fresh and main, free=(*FREE, GROWING))
    finished = None if fresh else finished_report(output / EVALUATION, flatten(config))
    if finished is not None and finished["clap"]["digest"] == resolved.digest:
        return finished if main else {}

    clap = load_clap_model(resolved, str(accelerator.device))
    tokens = ClapTokens(run, clap, resolved.digest, accelerator, workers=config.data.workers)
    unusable: dict[str, str] = {}
    examples, unreadable = prepare_examples(config, tokens, unusable)
    content = report_content(
        [(pair.chosen, pair.rejected) for pair in examples["train"].preference_pairs()], accelerator
    )
    places = places_of(example for split in SPLITS for example in examples[split].fixed())
    content |= report_prompts(places, clap.prompt_warnings, resolved.identity.name, quiet=not main)
    torch.manual_seed(config.loop.seed)
    model = build_model(config, clap, resolved)
    if config.init is not None:
        continue_head(model, config.init)
    validation = examples["validation"]
    fitted = fit(
        model.head,
        adamw(model.head, config.loop),
        partial(loss_of, config=config, examples=examples["train"], tokens=tokens),
        config.loop,
        run,
        accelerator=accelerator,
        title=f"reward {config.name}",
        evaluation=Evaluation(
            run=lambda head: evaluate_head(head, validation, tokens).validation_metrics(),
            every=config.evaluate_every,
            watched="pair_accuracy" if validation.preference_pairs() else "auc",
            patience=config.patience,
        ),
    )
    report: dict[str, Any] = {}
    if main:
        model.eval()
        scaling = fit_scaling(*evaluate_head(model.head, validation, tokens).calibration_data())
        outputs = evaluate_head(model.head, examples["test"], tokens)
        report = {
            **evaluation_report(outputs, tokens, scaling),
            **asdict(scaling),
            "best_step": fitted.best_step,
            "steps": fitted.steps,
            "examples": {split: counts(examples[split]) for split in SPLITS},
            "unreadable": {clip.name: reason for clip, reason in unreadable.items()},
            "unusable_prompts": unusable,
            **content,
            "clap": {"uri": config.clap, "name": resolved.identity.name, "digest": resolved.digest},
            "settings": flatten(config),
        }
        calibrated, png = model.calibrated(**asdict(scaling)), reliability_plot(outputs, scaling)
        identity = {"name": config.name, "version": config.version, "license": config.license}
        write_model(calibrated, output, report, png, **identity)
    accelerator.wait_for_everyone()
    return report


def prepare_examples(
    config: RewardTraining, tokens: ClapTokens, unusable: dict[str, str]
) -> tuple[dict[Split, Examples], dict[Clip, str]]:
    """Compute the tokens of all examples; return the examples of each split, and why clips were left out.

    `unusable` gets the rows that are left out for their prompts. Raises `InvalidInputError` if too many clips
    can't be read or too many prompts are unusable, or a split lacks what the objective needs.
    """
    quiet = not tokens.accelerator.is_main_process
    examples = load_examples(config.data, unusable, quiet=quiet)
    check_enough(examples, config)
    unreadable: dict[Clip, str] = {}
    for split in SPLITS:
        unreadable |= tokens.add(examples[split].clips(), scored=split == "test")
    clips = {clip for split in SPLITS for clip in examples[split].clips()}
    check_readable(unreadable, len(clips), config.data.max_unreadable, quiet=quiet)
    examples = {split: examples[split].without(set(unreadable)) for split in SPLITS}
    check_enough(examples, config)
    for split in SPLITS:
        tokens.add_prompts(example.prompt for example in examples[split].fixed())
    return examples, unreadable


def check_enough(examples: dict[Split, Examples], config: RewardTraining) -> None:
    """Raise `InvalidInputError` if a split lacks what the objective needs."""
    needs = {"labelled": config.objective != "bradley_terry", "pairs": config.objective != "bce"}
    for name, needed in needs.items():
        if needed and not getattr(examples["train"], name):
            raise invalid(
                "objective",
                f"is {config.objective}, which learns from {name}, and there are none; give data.{name}, "
                "data.soundworld.contrasts, or another objective",
            )
    for split in SPLITS[1:]:
        labels = {example.label > 0.5 for example in examples[split].labelled}
        if not examples[split].preference_pairs() and len(labels) < 2:
            raise invalid(
                "data",
                f"has neither pairs nor both labels among the prompts of the {split} split (5 % of the "
                "prompts); give more prompts",
            )


def build_model(config: RewardTraining, clap: ClapModel, resolved: ResolvedModel) -> RewardModel:
    """Return a reward model on `clap` with a randomly initialised head."""
    sizes = RewardConfig(
        text_width=clap.text_width,
        audio_width=clap.audio_width,
        clap_name=resolved.identity.name,
        clap_digest=resolved.digest,
        **asdict(config.head),
    )
    return RewardModel(clap, sizes).to(clap.device)


def continue_head(model: RewardModel, folder: Path) -> None:
    """Load the head of the reward model in `folder`.

    Raises `ModelFormatError` if it is none, of other sizes, or not finite.
    """
    read_reward_config(folder)
    weights = load_file(folder / WEIGHTS_NAME)
    check_weights(str(folder), model.head, weights)
    check_finite(str(folder), weights)
    model.head.load_state_dict({name: value.float() for name, value in weights.items()})


def loss_of(
    head: nn.Module, positions: Positions, *, config: RewardTraining, examples: Examples, tokens: ClapTokens
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the examples at `positions`, with paraphrased prompts, and its metrics."""
    losses, metrics = [], {}
    seed = config.loop.seed
    if config.objective != "bradley_terry":
        labelled = [examples.labelled[i] for i in examples_at(positions, len(examples.labelled), seed)]
        prompts = [paraphrased(e, seed, int(p)) for e, p in zip(labelled, positions, strict=True)]
        logits_B = head(tokens.text(prompts), tokens.audio([example.clip for example in labelled]))
        labels_B = torch.tensor([example.label for example in labelled], device=logits_B.device)
        metrics["accuracy"] = ((logits_B > 0) == (labels_B > 0.5)).float().mean()
        losses.append(
            binary_cross_entropy(
                logits_B,
                labels_B,
                label_smoothing=config.label_smoothing,
                class_weights=config.class_weights,
            )
        )
    if config.objective != "bce":
        pairs = [examples.pairs[i] for i in examples_at(positions, len(examples.pairs), seed)]
        prompts = [paraphrased(e, seed, int(p)) for e, p in zip(pairs, positions, strict=True)]
        clips = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        chosen_B, rejected_B = head(tokens.text(prompts * 2), tokens.audio(clips)).chunk(2)
        metrics["pair_accuracy"] = (chosen_B > rejected_B).float().mean()
        losses.append(bradley_terry(chosen_B, rejected_B, label_smoothing=config.label_smoothing))
    return torch.stack(losses).sum(), metrics


def paraphrased(example: LabelledClip | Pair, seed: int, position: int) -> str:
    """Return the prompt, or if its truth is known, a paraphrase that belongs to the training split."""
    if example.truth is None:
        return example.prompt
    rng = np.random.default_rng([seed, position])
    return paraphrase(example.truth, rng, "train", unread=UNREAD) or example.prompt
