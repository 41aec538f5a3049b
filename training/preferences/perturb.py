"""Captions made somewhat wrong, for strategies 2 and 3: by an LLM, or by rules, offline.

Writes ``perturbed.jsonl``: `caption`, `strategy` (2: of the selected captions; 3: of those with a temporal
of time), `perturbed`, and the `kind` of mistake.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from services.files import side_by_side
from training.data.store import Row, claim, file_digest, finish, write_rows
from training.loop.checks import Natural, Seed, check_ranges
from training.loop.config import Plain, flatten
from training.loop.progress import progress
from training.preferences.captions import CAPTIONS, TEMPORAL, selected, temporal
from training.preferences.llm import FREE as LLM_FREE
from training.preferences.llm import LLMConfig, LLMPerturber
from training.preferences.perturbation import KINDS, BadAnswerError, Kind, Perturbation, Perturber, Strategy
from training.preferences.rules import RulePerturber

PERTURBED = "perturbed.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class PerturbConfig:
    """Who perturbs, and how many captions. The numbers are the paper's."""

    perturber: Literal["rules", "llm"] = "rules"
    """rules: offline, deterministic. llm: any OpenAI-compatible endpoint."""
    concept: Natural = 5
    """Strategy 2: perturbed captions of each selected caption; 0 leaves the strategy out."""
    temporal: Natural = 5
    """Strategy 3: perturbed captions of each caption with an order of time; 0 leaves the strategy out."""
    concept_kinds: tuple[str, ...] = ("reword", "replace", "add")
    """Kinds of mistake of the rules in strategy 2, taken in turn."""
    temporal_kinds: tuple[str, ...] = ("swap", "add", "remove", "replace")
    """Kinds of mistake of the rules in strategy 3, taken in turn."""
    seed: Seed = 0
    """Seed of the rules."""
    llm: LLMConfig = field(default_factory=LLMConfig)
    """Settings of the LLM, if `perturber` is llm."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for kind in (*self.concept_kinds, *self.temporal_kinds):
            if kind not in KINDS:
                raise ValueError(f"{kind!r} is no kind of mistake; there are {', '.join(KINDS)}")


FREE: Final = tuple(f"llm.{name}" for name in LLM_FREE)


def perturb_identity(config: PerturbConfig, captions: Path) -> dict[str, Plain]:
    """Return all that determines the result."""
    inputs = {f"input.{name}": file_digest(captions / name) for name in (CAPTIONS, TEMPORAL)}
    return flatten(config) | inputs


def perturb_captions(
    config: PerturbConfig, captions: Path, output: Path, *, perturber: Perturber | None = None
) -> Row:
    """Run the stage in `output`; return its report: how many of which kind, and how many were skipped.

    `captions` is the folder of the stage before. `perturber` replaces the one that the config names.
    What an LLM has answered is on disk at once, so a stage that was stopped requests nothing twice.

    Raises:
        InvalidInputError: a wrong setting of the LLM.
        MilongaError: the LLM's endpoint can't be reached, or refuses.
    """
    if report := claim(output, perturb_identity(config, captions), FREE):
        return report
    texts: dict[Strategy, list[str]] = {"2": selected(captions), "3": temporal(captions)}
    counts: dict[Strategy, int] = {"2": config.concept, "3": config.temporal}
    requests = [(strategy, caption) for strategy in counts if counts[strategy] for caption in texts[strategy]]
    perturber = perturber or _perturber(config, (*texts["2"], *texts["3"]), output)
    made: dict[tuple[Strategy, str], list[Perturbation]] = {}
    bad: dict[tuple[Strategy, str], str] = {}

    def work(item: tuple[Strategy, str]) -> list[Perturbation] | BadAnswerError:
        strategy, caption = item
        try:
            return perturber.perturb(caption, strategy, counts[strategy])
        except BadAnswerError as error:
            return error

    count = config.llm.in_flight if config.perturber == "llm" else 1
    with progress(total=len(requests), desc="perturbed captions", unit="caption") as bar:
        for item, answer in side_by_side(work, requests, count):
            if isinstance(answer, BadAnswerError):
                bad[item] = str(answer)
            else:
                made[item] = answer
            bar.update()
    # In the order of the captions, not of the answers.
    rows: list[Row] = [
        {"caption": caption, "strategy": strategy, "perturbed": found.text, "kind": found.kind}
        for strategy, caption in requests
        for found in made.get((strategy, caption), [])
    ]
    write_rows(output / PERTURBED, rows)
    without = [caption for (_, caption), found in made.items() if not found]
    return finish(
        output,
        {
            "asked": len(requests),
            "made": len(rows),
            "by_strategy": dict(sorted(Counter(row["strategy"] for row in rows).items())),
            "by_kind": dict(sorted(Counter(row["kind"] for row in rows).items())),
            "without_any": len(without),
            "bad_answers": len(bad),
            "bad": [
                {"caption": caption, "reason": bad[strategy, caption]} for strategy, caption in sorted(bad)
            ],
        },
    )


def _perturber(config: PerturbConfig, captions: Iterable[str], output: Path) -> Perturber:
    if config.perturber == "llm":
        return LLMPerturber(config.llm, config.llm.cache or output / "answers")
    kinds: dict[Strategy, tuple[Kind, ...]] = {
        "2": tuple(kind for name in config.concept_kinds for kind in KINDS if kind == name),
        "3": tuple(kind for name in config.temporal_kinds for kind in KINDS if kind == name),
    }
    return RulePerturber(captions, seed=config.seed, kinds=kinds)
