"""Build pairs from scored clips: by strategy and filtered as in the paper, or best against worst.

Writes ``pairs.jsonl``: `prompt`, `strategy`, `chosen` and `rejected` (ids of clips), and their scores and
rewards.

Legend: P pairs, S scorers.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray

from services.errors import invalid
from training.data.store import REPORT, Row, claim, file_digest, finish, read_json, read_rows, write_rows
from training.loop.checks import Factor, Range, Share, check_ranges
from training.loop.config import Plain, flatten
from training.preferences.candidates import candidates_digest, read_candidates
from training.preferences.scores import SCORES, read_scores

PAIRS = "pairs.jsonl"
RANKED = "ranked"
"""`strategy` of pairs of the mode `ranked`."""

Matrix = NDArray[np.float64]

Cosine = Annotated[float, Range(-1, 1)]
CosineDifference = Annotated[float, Range(-2, 2)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Conditions for a pair, by scorer. The defaults are the paper's for 630k-audioset-best and 630k-best."""

    alpha: tuple[Cosine, ...] = (0.45, 0.60)
    """Least score of the chosen clip."""
    beta: tuple[Cosine, ...] = (0.40, 0.0)
    """Least score of the rejected clip: a near miss teaches more."""
    delta_min: tuple[CosineDifference, ...] = (0.05, 0.08)
    """Least difference of the scores."""
    delta_max: tuple[CosineDifference, ...] = (0.35, 0.70)
    """Greatest difference of the scores."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if len({len(self.alpha), len(self.beta), len(self.delta_min), len(self.delta_max)}) != 1:
            raise ValueError("alpha, beta, delta_min and delta_max need one value per scorer each")
        for low, high in zip(self.delta_min, self.delta_max, strict=True):
            if low > high:
                raise ValueError(f"delta_min ({low}) is above delta_max ({high})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiles:
    """Thresholds as quantiles of the pool's scores, for scorers whose scale is not LAION's."""

    alpha: Share = 0.25
    """Quantile of the chosen clips' scores."""
    beta: Share = 0.10
    """Quantile of the rejected clips' scores."""
    delta_min: Share = 0.25
    """Quantile of the positive differences: the lower bound."""
    delta_max: Share = 0.98
    """Quantile of the positive differences: the upper bound."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.delta_min > self.delta_max:
            raise ValueError(f"delta_min ({self.delta_min}) is above delta_max ({self.delta_max})")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsConfig:
    """Settings of the choice of pairs."""

    mode: Literal["strategies", "ranked"] = "strategies"
    """strategies: the paper's, filtered by the ensemble. ranked: the best of a caption's clips against the
    worst, as rounds of alignment do."""
    rank_by: str = "first"
    """Value that ranks clips: a scorer's name, first (of the ensemble), mean (of all), or reward."""
    margin: Factor = 0.0
    """Least difference of the values of `rank_by`, in ranked mode."""
    calibrate: bool = False
    """Use `quantiles` of the scores instead of `thresholds`."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """Thresholds of the filter, in the order of the scorers."""
    quantiles: Quantiles = field(default_factory=Quantiles)
    """Thresholds of the filter if `calibrate` is true."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A condition of the filter, and how many pairs it removed."""

    scorer: str
    name: str
    """Text of the condition: chosen >= 0.45."""
    alone: int
    """Pairs that fail it."""
    first: int
    """Pairs that fail it, and none of the conditions before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Pairs before the filter."""

    rows: tuple[Row, ...]
    chosen_PS: Matrix
    """CLAP scores of the chosen clips."""
    rejected_PS: Matrix
    """CLAP scores of the rejected clips."""


def pairs_identity(config: PairsConfig, candidates: Path, scores: Path) -> dict[str, Plain]:
    """Return all that determines the result."""
    return flatten(config) | {
        "input.candidates": candidates_digest(candidates),
        f"input.{SCORES}": file_digest(scores / SCORES),
    }


def make_pairs(config: PairsConfig, candidates: Path, scores: Path, output: Path) -> Row:
    """Run the stage in `output`; return its report: the pool, the thresholds, what each removed, table 2.

    `candidates` and `scores` are the folders of the stages before.

    Raises `InvalidInputError` if no pair is left, with the count that each condition removed, or if the
    number of thresholds is not the number of scorers.
    """
    if report := claim(output, pairs_identity(config, candidates, scores)):
        return report
    names = [scorer["name"] for scorer in read_json(scores / REPORT)["scorers"]]
    scored = valued(read_candidates(candidates), read_scores(scores), names, config.rank_by)
    pool = _pool(ranked(scored) if config.mode == "ranked" else by_strategy(scored), names)
    if not pool.rows:
        raise invalid("pairs", "no caption has two clips to choose between; make more clips per caption")
    thresholds: Thresholds | None = None
    if config.mode == "ranked":
        kept_P, conditions = _margin_filter(pool, config.margin, config.rank_by)
    else:
        thresholds = calibrate(pool, config.quantiles) if config.calibrate else config.thresholds
        kept_P, conditions = ensemble_filter(pool, thresholds, names)
    if not kept_P.any():
        removed = "; ".join(
            f"{one.scorer}: {one.name} removed {one.first} (alone {one.alone})"
            for one in conditions
            if one.alone
        )
        remedy = "lower margin" if config.mode == "ranked" else "lower the thresholds, or set calibrate=true"
        raise invalid("pairs", f"none of {len(pool.rows)} pairs is left: {removed}; {remedy}")
    rows = [row for row, kept in zip(pool.rows, kept_P, strict=True) if kept]
    write_rows(output / PAIRS, rows)
    return finish(
        output,
        {
            "pool": len(pool.rows),
            "pairs": len(rows),
            "scorers": names,
            "thresholds": None if thresholds is None else asdict(thresholds),
            "removed": [asdict(one) for one in conditions],
            "pool_table": table_2(pool.rows, names),
            "table": table_2(rows, names),
        },
    )


def read_pairs(folder: Path) -> list[Row]:
    """Read the pairs that the stage wrote into `folder`."""
    return read_rows(folder / PAIRS)


def valued(
    candidates: Iterable[Row], scores: Mapping[str, Row], names: Sequence[str], rank_by: str
) -> list[Row]:
    """Return the candidates with scores: with `scores`, `reward`, and `value`, by which `rank_by` ranks them.

    Raises `InvalidInputError` if no value is called `rank_by`.
    """
    scored = [{**row, **scores[row["id"]]} for row in candidates if row["id"] in scores]
    known = ("first", "mean", *names) if names else ()
    if rank_by == "reward":
        if any(row["reward"] is None for row in scored):
            raise invalid("rank_by", "is reward, and the clips have none; score them with a reward model")
    elif rank_by not in known:
        raise invalid("rank_by", f"is {rank_by!r}, must be one of {', '.join((*known, 'reward'))}")
    for row in scored:
        values = [row["scores"][name] for name in names]
        match rank_by:
            case "reward":
                row["value"] = row["reward"]
            case "first":
                row["value"] = values[0]
            case "mean":
                row["value"] = float(np.mean(values))
            case _:
                row["value"] = row["scores"][rank_by]
    return scored


def by_strategy(scored: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return (chosen, rejected) of section 4.1.2: in strategies 1.1 and 1.2 the best clip against each of the
    others, in 2 and 3 the caption's clip against each perturbed caption's that is worse."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in scored:
        groups[row["strategy"], row["caption"]].append(row)
    found = []
    for (strategy, _), rows in groups.items():
        if strategy in ("1.1", "1.2"):
            best = max(rows, key=lambda row: float(row["value"]))
            found += [(best, row) for row in rows if row is not best]
        else:
            own = [row for row in rows if row["kind"] is None]
            wrong = [row for row in rows if row["kind"] is not None]
            found += [(one, row) for one in own for row in wrong if one["value"] > row["value"]]
    return found


def ranked(scored: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return (chosen, rejected): the best and the worst of all clips of each unperturbed caption."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in scored:
        if row["kind"] is None:
            groups[row["caption"]].append(row)
    found = []
    for rows in groups.values():
        ordered = sorted(rows, key=lambda row: -float(row["value"]))
        if len(ordered) > 1:
            found.append(({**ordered[0], "strategy": RANKED}, ordered[-1]))
    return found


def calibrate(pool: Pool, quantiles: Quantiles) -> Thresholds:
    """Return the thresholds at these quantiles of the pool's scores, for each scorer by itself.

    Raises `InvalidInputError` if a scorer scores no chosen clip above its rejected one.
    """
    delta_PS = pool.chosen_PS - pool.rejected_PS
    positive = [column[column > 0] for column in delta_PS.T]
    if any(not len(column) for column in positive):
        raise invalid("calibrate", "is true, and a scorer scores no chosen clip above its rejected one")
    return Thresholds(
        alpha=_quantiles(pool.chosen_PS.T, quantiles.alpha),
        beta=_quantiles(pool.rejected_PS.T, quantiles.beta),
        delta_min=_quantiles(positive, quantiles.delta_min),
        delta_max=_quantiles(positive, quantiles.delta_max),
    )


def ensemble_filter(
    pool: Pool, thresholds: Thresholds, names: Sequence[str]
) -> tuple[NDArray[np.bool_], list[Condition]]:
    """Return which pairs pass all conditions of all scorers [P], and what each condition removed."""
    if len(thresholds.alpha) != len(names):
        raise invalid(
            "thresholds",
            f"are for {len(thresholds.alpha)} scorers, and there are {len(names)}: {', '.join(names)}",
        )
    passes: list[tuple[str, str, NDArray[np.bool_]]] = []
    for s, name in enumerate(names):
        chosen_P, rejected_P = pool.chosen_PS[:, s], pool.rejected_PS[:, s]
        delta_P = chosen_P - rejected_P
        alpha, beta = thresholds.alpha[s], thresholds.beta[s]
        low, high = thresholds.delta_min[s], thresholds.delta_max[s]
        passes += [
            (name, f"chosen >= {alpha:.4g}", chosen_P >= alpha),
            (name, f"rejected >= {beta:.4g}", rejected_P >= beta),
            (name, "chosen > rejected", chosen_P > rejected_P),
            (name, f"difference >= {low:.4g}", delta_P >= low),
            (name, f"difference <= {high:.4g}", delta_P <= high),
        ]
    return _apply(passes, len(pool.rows))


ALL: Final = "all"
"""Last row of table 2."""


def table_2(rows: Iterable[Row], names: Sequence[str]) -> dict[str, Row]:
    """Return the paper's table 2, by strategy and of all.

    Each row has the number of samples, and by scorer the means of chosen, rejected and difference. `rows`
    have `strategy`, `chosen_scores` and `rejected_scores`.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["strategy"]].append(row)
    ordered = {strategy: groups[strategy] for strategy in sorted(groups)}
    ordered[ALL] = [row for group in ordered.values() for row in group]
    return {strategy: {"samples": len(group), **_means(group, names)} for strategy, group in ordered.items()}


def _means(rows: Sequence[Row], names: Sequence[str]) -> Row:
    means: Row = {}
    for name in names if rows else ():
        chosen = float(np.mean([row["chosen_scores"][name] for row in rows]))
        rejected = float(np.mean([row["rejected_scores"][name] for row in rows]))
        means[name] = {"chosen": chosen, "rejected": rejected, "delta": chosen - rejected}
    return means


def _pool(pairs: Sequence[tuple[Row, Row]], names: Sequence[str]) -> Pool:
    rows = tuple(
        {
            "prompt": chosen["caption"],
            "strategy": chosen["strategy"],
            "chosen": chosen["id"],
            "rejected": rejected["id"],
            **{f"chosen_{name}": chosen[name] for name in ("scores", "reward", "value")},
            **{f"rejected_{name}": rejected[name] for name in ("scores", "reward", "value")},
        }
        for chosen, rejected in pairs
    )

    def matrix(side: str) -> Matrix:
        values = [[row[f"{side}_scores"][name] for name in names] for row in rows]
        return np.array(values, dtype=np.float64).reshape(len(rows), len(names))

    return Pool(rows=rows, chosen_PS=matrix("chosen"), rejected_PS=matrix("rejected"))


def _margin_filter(pool: Pool, margin: float, rank_by: str) -> tuple[NDArray[np.bool_], list[Condition]]:
    delta_P = np.array([row["chosen_value"] - row["rejected_value"] for row in pool.rows])
    return _apply(
        [
            (rank_by, "chosen > rejected", delta_P > 0),
            (rank_by, f"difference >= {margin:.4g}", delta_P >= margin),
        ],
        len(pool.rows),
    )


def _apply(
    passes: Sequence[tuple[str, str, NDArray[np.bool_]]], count: int
) -> tuple[NDArray[np.bool_], list[Condition]]:
    kept_P = np.ones(count, dtype=bool)
    conditions = []
    for scorer, name, passes_P in passes:
        alone, first = int((~passes_P).sum()), int((kept_P & ~passes_P).sum())
        conditions.append(Condition(scorer=scorer, name=name, alone=alone, first=first))
        kept_P &= passes_P
    return kept_P, conditions


def _quantiles(columns: Iterable[NDArray[np.float64]], at: float) -> tuple[float, ...]:
    return tuple(float(np.quantile(column, at)) for column in columns)
