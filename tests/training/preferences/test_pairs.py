from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.errors import InvalidInputError
from tests.training.preferences.conftest import Stages
from training.data.store import Row, read_json
from training.loop.config import override
from training.preferences.pairs import (
    PairsConfig,
    Quantiles,
    Thresholds,
    by_strategy,
    calibrate,
    ensemble_filter,
    make_pairs,
    ranked,
    read_pairs,
    table_2,
    valued,
)
from training.preferences.pairs import Pool as PairPool

NAMES = ("a", "b")


def _clip(
    number: int, strategy: str, scores: tuple[float, float], kind: str | None = None, caption: str = "c"
) -> tuple[Row, Row]:
    row = {"id": str(number), "strategy": strategy, "caption": caption, "kind": kind}
    return row, {"id": str(number), "scores": dict(zip(NAMES, scores, strict=True)), "reward": -float(number)}


def _judged(*clips: tuple[Row, Row], rank_by: str = "first") -> list[Row]:
    return valued([row for row, _ in clips], {row["id"]: row for _, row in clips}, NAMES, rank_by)


def _ids(pairs: list[tuple[Row, Row]]) -> list[tuple[str, str]]:
    return [(chosen["id"], rejected["id"]) for chosen, rejected in pairs]


def _pool(chosen: list[tuple[float, float]], rejected: list[tuple[float, float]]) -> PairPool:
    return PairPool(
        rows=tuple({} for _ in chosen), chosen_PS=np.array(chosen), rejected_PS=np.array(rejected)
    )


def test_the_best_of_four_against_each_of_the_others() -> None:
    clips = [_clip(i, "1.2", (s, 0.0)) for i, s in enumerate((0.2, 0.6, 0.5, 0.1))]
    assert _ids(by_strategy(_judged(*clips))) == [("1", "0"), ("1", "2"), ("1", "3")]
    # Strategies and captions are kept apart.
    other = [_clip(9, "1.1", (0.9, 0.0)), _clip(8, "1.2", (0.9, 0.0), caption="d")]
    assert len(by_strategy(_judged(*clips, *other))) == 3


def test_the_captions_clip_against_those_of_perturbed_captions_that_are_worse() -> None:
    clips = [
        _clip(0, "3", (0.5, 0.1)),
        _clip(1, "3", (0.4, 0.9), "swap"),
        _clip(2, "3", (0.6, 0.0), "add"),
        _clip(3, "3", (0.5, 0.0), "remove"),
    ]
    assert _ids(by_strategy(_judged(*clips))) == [("0", "1")]
    assert _ids(by_strategy(_judged(*clips, rank_by="b"))) == [("0", "2"), ("0", "3")]
    assert _ids(by_strategy(_judged(*clips, rank_by="reward"))) == [("0", "1"), ("0", "2"), ("0", "3")]
    # Unread, the caption's clip leaves nothing to compare with.
    assert by_strategy(_judged(*clips[1:])) == []


def test_ranking_takes_the_best_and_the_worst_of_what_was_made_of_the_caption() -> None:
    clips = [_clip(i, "1.2", (s, 1 - s)) for i, s in enumerate((0.2, 0.6, 0.5))]
    wrong = _clip(7, "2", (0.0, 0.0), "swap")
    ((chosen, rejected),) = ranked(_judged(*clips, wrong))
    assert (chosen["id"], rejected["id"], chosen["strategy"]) == ("1", "0", "ranked")
    assert _ids(ranked(_judged(*clips, wrong, rank_by="reward"))) == [("0", "2")]
    assert ranked(_judged(clips[0])) == []


def test_the_papers_thresholds_and_what_each_removes() -> None:
    chosen = [
        (0.50, 0.70),
        (0.44, 0.70),
        (0.50, 0.59),
        (0.50, 0.70),
        (0.50, 0.70),
        (0.80, 0.75),
        (0.50, 0.60),
    ]
    rejected = [
        (0.42, 0.30),
        (0.40, 0.30),
        (0.42, 0.30),
        (0.39, 0.3),
        (0.46, 0.3),
        (0.44, 0.04),
        (0.41, 0.61),
    ]
    pool = _pool(chosen, rejected)
    kept, conditions = ensemble_filter(pool, Thresholds(), NAMES)
    assert kept.tolist() == [True, False, False, False, False, False, False]
    told = {(one.scorer, one.name): (one.alone, one.first) for one in conditions}
    assert told["a", "chosen >= 0.45"] == (1, 1)
    assert told["a", "rejected >= 0.4"] == (1, 1)
    # The second pair's difference is too small as well, and was counted before.
    assert told["a", "difference >= 0.05"] == (2, 1)
    assert told["a", "difference <= 0.35"] == (1, 1)
    assert told["b", "chosen >= 0.6"] == (1, 1)
    assert told["b", "chosen > rejected"] == (1, 1)
    assert told["b", "difference <= 0.7"] == (1, 0)
    assert sum(one.first for one in conditions) == 6
    # Bounds belong to the range.
    edge = _pool([(0.75, 0.625)], [(0.5, 0.0)])
    exact = Thresholds(alpha=(0.75, 0.625), beta=(0.5, 0.0), delta_min=(0.25, 0.625), delta_max=(0.25, 0.625))
    assert ensemble_filter(edge, exact, NAMES)[0].all()
    with pytest.raises(InvalidInputError, match="for 2 scorers, and there are 1"):
        ensemble_filter(pool, Thresholds(), ["a"])


def test_thresholds_from_quantiles() -> None:
    rng = np.random.default_rng(0)
    rejected = rng.normal(0.0, 0.1, (400, 2))
    chosen = rejected + rng.normal(0.1, 0.1, (400, 2))
    pool = PairPool(rows=tuple({} for _ in chosen), chosen_PS=chosen, rejected_PS=rejected)
    found = calibrate(pool, Quantiles(alpha=0.3, beta=0.2, delta_min=0.1, delta_max=0.9))
    for s in range(2):
        delta = (chosen - rejected)[:, s]
        assert np.mean(chosen[:, s] >= found.alpha[s]) == pytest.approx(0.7, abs=0.01)
        assert np.mean(rejected[:, s] >= found.beta[s]) == pytest.approx(0.8, abs=0.01)
        inside = (delta >= found.delta_min[s]) & (delta <= found.delta_max[s])
        assert inside.sum() / (delta > 0).sum() == pytest.approx(0.8, abs=0.01)
    with pytest.raises(InvalidInputError, match="scores no chosen clip above"):
        calibrate(_pool([(0.1, 0.1)], [(0.2, 0.0)]), Quantiles())


def test_table_2_by_hand() -> None:
    def row(strategy: str, chosen: float, rejected: float) -> Row:
        return {"strategy": strategy, "chosen_scores": {"a": chosen}, "rejected_scores": {"a": rejected}}

    table = table_2([row("3", 0.6, 0.2), row("1.1", 0.5, 0.4), row("3", 0.8, 0.4)], ["a"])
    assert list(table) == ["1.1", "3", "all"]
    assert [table[name]["samples"] for name in table] == [1, 2, 3]
    assert table["3"]["a"] == pytest.approx({"chosen": 0.7, "rejected": 0.3, "delta": 0.4})
    assert table["all"]["a"]["delta"] == pytest.approx(0.3)


def test_the_stage(stages: Stages, tmp_path: Path) -> None:
    report = read_json(stages.pairs / "report.json")
    pairs = read_pairs(stages.pairs)
    assert 0 < len(pairs) == report["pairs"] <= report["pool"]
    assert report["pool"] - sum(one["first"] for one in report["removed"]) == report["pairs"]
    assert all(
        row["chosen_scores"][n] > row["rejected_scores"][n] for row in pairs for n in report["scorers"]
    )
    config = PairsConfig(mode="ranked", rank_by="reward")
    by_reward = make_pairs(config, stages.candidates, stages.scores, tmp_path / "ranked")
    rewards = [(row["chosen_reward"], row["rejected_reward"]) for row in read_pairs(tmp_path / "ranked")]
    assert all(chosen > rejected for chosen, rejected in rewards)
    assert set(by_reward["table"]) == {"ranked", "all"}
    margin = sorted(chosen - rejected for chosen, rejected in rewards)[1]
    fewer = make_pairs(replace(config, margin=margin), stages.candidates, stages.scores, tmp_path / "margin")
    assert fewer["pairs"] == by_reward["pairs"] - 1


def test_none_left_says_what_removed_how_many(stages: Stages, tmp_path: Path) -> None:
    config = override(PairsConfig(), ["thresholds.alpha=0.99,0.6"])
    with pytest.raises(
        InvalidInputError,
        match=r"none of \d+ pairs is left: clap-a: chosen >= 0.99 removed \d+ \(alone \d+\)",
    ):
        make_pairs(config, stages.candidates, stages.scores, tmp_path / "none")
    with pytest.raises(InvalidInputError, match="lower margin"):
        make_pairs(PairsConfig(mode="ranked", margin=9), stages.candidates, stages.scores, tmp_path / "b")
    with pytest.raises(InvalidInputError, match="must be one of first, mean, clap-a, clap-b, reward"):
        make_pairs(PairsConfig(rank_by="best"), stages.candidates, stages.scores, tmp_path / "c")
