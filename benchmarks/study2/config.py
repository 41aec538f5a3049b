"""Settings of the study, and what they amount to: data sets and trainings, each from which model.

A training's name is METHOD-SEED. Methods share what they have in common: `sft-dpo` continues the model of
`sft`, `rounds` that of `dpo`, and all first rounds learn from clips of one set of candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from training.evaluation.config import EvaluationConfig
from training.finetuning.baton import BatonTraining
from training.finetuning.dpo import DpoTraining
from training.finetuning.session import FineTuning
from training.finetuning.sft import SftTraining
from training.loop.checks import Count, Natural, Positive, Seed, check_ranges
from training.preferences.pipeline import PreferencesConfig
from training.soundworld.scenes import Split

Method = Literal["sft", "dpo", "sft-dpo", "safeguarded", "crpo", "baton", "rounds", "online"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Methods, in the order of the tables."""
BASE: Final = "base"
"""Name of the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """Number of prompts of each kind, all with two or three events; 0 leaves a kind out."""

    split: Split = "test"
    """`validation` to choose settings; `test` once, for the result."""
    short: Count = 300
    """Prompts of two events, clips of 2.56 s."""
    long: Natural = 100
    """Prompts of three events, clips of 5.12 s."""
    held_out: Natural = 150
    """Prompts of two events by templates of no training, clips of 2.56 s. The primary figure is without."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRun:
    """All settings. What links the stages (models, data sets, seeds, caches) is filled in."""

    name: str
    """Name of the study and of its folder."""
    preferences: PreferencesConfig
    """The shared candidates, sampled from the start, and their pairs."""
    sft: SftTraining
    """`sft`, and the first part of `sft-dpo`."""
    dpo: DpoTraining
    """`dpo`, the first round of `rounds`, and the growth with pairs and with beta."""
    after_sft: DpoTraining
    """The second part of `sft-dpo`; the reference is the start, as Tango 2's."""
    safeguarded: DpoTraining
    """Diffusion-SDPO."""
    crpo: DpoTraining
    """DPO with the chosen clips' denoising loss."""
    baton: BatonTraining
    second_preferences: PreferencesConfig
    """The second round's pairs, sampled from DPO's model."""
    second: DpoTraining
    """The second round of `rounds`."""
    online_preferences: PreferencesConfig
    """The later rounds' clips of `online`, sampled from its policy."""
    online: SftTraining
    """One round of `online`, RAFT: SFT on the best clip of each caption."""
    scoring: EvaluationConfig
    """Seeds, sampling, scorers, judge and spaces of the evaluation."""
    prompts: Prompts
    start: str = "mini-base"
    """URI of the model that is aligned."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Training seeds."""
    methods: tuple[Method, ...] = METHODS
    pairs: Natural = 1_000
    """Pairs that the methods learn from, the first ones in a random order; 0: all."""
    online_rounds: Count = 3
    growth_pairs: tuple[Count, ...] = (100, 300, 1_000)
    """Numbers of pairs of the growth curve, of one training seed each, of as many steps each."""
    growth_betas: tuple[Positive, ...] = (30.0, 60.0, 125.0, 250.0, 1_000.0)
    """Values of beta of the other curve."""
    judge_clips: Count = 6_000
    """Scenes that the second judge is trained on."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("seeds", "methods", "growth_pairs", "growth_betas"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "seeds" and not values):
                raise ValueError(f"{name} is {','.join(map(str, values)) or 'empty'}, must be different ones")


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """A data set of pairs."""

    name: str
    model: str
    """Training, or `BASE`, whose clips are ranked."""
    config: PreferencesConfig
    limit: int = 0
    """Pairs of a training that uses it; 0: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A model to train."""

    name: str
    start: str
    """Training, or `BASE`, that it continues."""
    data: Data
    config: FineTuning
    scored: bool = True
    """Evaluate it; otherwise it is an intermediate model."""


def trainings(config: StudyRun) -> list[Training]:
    """Return all trainings, each after those that it depends on."""
    found: list[Training] = []
    for seed in config.seeds:
        of_seed = {method: chain(config, method, seed) for method in METHODS}
        wanted = {one.name: one for method in config.methods for one in of_seed[method]}
        scored = {f"{method}-{seed}" for method in config.methods}
        found += [replace(one, scored=one.name in scored) for one in wanted.values()]
    return found + growth(config)


def chain(config: StudyRun, method: Method, seed: int) -> list[Training]:
    """Return the trainings that end in METHOD-SEED; the first ones may be another method's too."""
    shared = shared_data(config)

    def train(name: str, training: FineTuning, start: str = BASE, data: Data = shared) -> Training:
        settings = replace(training, name=name, loop=replace(training.loop, seed=seed))
        return Training(name=name, start=start, data=data, config=settings)

    name, sft, dpo = f"{method}-{seed}", train(f"sft-{seed}", config.sft), train(f"dpo-{seed}", config.dpo)
    match method:
        case "sft":
            return [sft]
        case "dpo":
            return [dpo]
        case "sft-dpo":
            return [sft, train(name, config.after_sft, sft.name)]
        case "safeguarded":
            return [train(name, config.safeguarded)]
        case "crpo":
            return [train(name, config.crpo)]
        case "baton":
            return [train(name, config.baton)]
        case "rounds":
            second = Data(name=name, model=dpo.name, config=seeded(config.second_preferences, 1 + seed))
            return [dpo, train(name, config.second, dpo.name, second)]
        case "online":
            return _online(config, seed, train)


def _online(config: StudyRun, seed: int, train: Callable[..., Training]) -> list[Training]:
    """Return RAFT's rounds. The first one ranks the shared candidates, without a margin."""
    best = replace(config.preferences, pairs=replace(config.preferences.pairs, margin=0.0))
    found: list[Training] = []
    for number in range(config.online_rounds):
        last = number == config.online_rounds - 1
        name = f"online-{seed}" if last else f"online.{number + 1}-{seed}"
        start = found[-1].name if found else BASE
        later = seeded(config.online_preferences, 100 + 10 * seed + number)
        data = Data(name=name, model=start, config=later if found else best)
        if not found:
            data = replace(data, name="best", limit=0)
        found.append(train(name, config.online, start, data))
    return found


def shared_data(config: StudyRun) -> Data:
    """Return the pairs of the start's clips that all methods learn from."""
    return Data(name="shared", model=BASE, config=config.preferences, limit=config.pairs)


def growth(config: StudyRun) -> list[Training]:
    """Return DPO on other numbers of pairs, and with other values of beta, of the first training seed."""
    seed = config.seeds[0]
    (dpo,) = chain(config, "dpo", seed)
    found = []
    for pairs in config.growth_pairs:
        data = replace(dpo.data, limit=pairs)
        found.append(replace(dpo, name=f"pairs-{pairs}", data=data))
    for beta in config.growth_betas:
        assert isinstance(dpo.config, DpoTraining)
        found.append(replace(dpo, name=f"beta-{beta:g}", config=replace(dpo.config, beta=beta)))
    return [replace(one, config=replace(one.config, name=one.name)) for one in found]


def seeded(config: PreferencesConfig, shift: int) -> PreferencesConfig:
    """Return `config` with other captions and other noise for each `shift`."""
    captions = replace(config.captions, seed=config.captions.seed + shift)
    candidates = replace(config.candidates, seed=config.candidates.seed + shift)
    return replace(config, captions=captions, candidates=candidates)


def linked(training: Training, models: Mapping[str, str], pairs: Any, cache: Any) -> FineTuning:
    """Return the settings of a training with its start, its reference, its data and the shared cache.

    `models` has the URIs of `BASE` and of the trainings before it.
    """
    config = training.config
    changes: dict[str, Any] = {
        "start": models[training.start],
        "data": replace(config.data, pairs=(pairs,)),  # type: ignore[attr-defined]
        "latents": replace(config.latents, cache=cache),
    }
    if isinstance(config, DpoTraining):
        # Tango 2's: of a model after SFT the reference is the one before it. A later round's is its start.
        changes["reference"] = models[BASE] if training.start.startswith("sft-") else None
    return replace(config, **changes)
