"""Score every clip against its caption: by several CLAP models, and by a reward model if one is given.

Writes ``scores.jsonl``: `id` of the clip, `scores` by scorer, `reward` (a logit, or null), `warnings` (on the
caption, by those that do not read it in full; in the report, they are counted). The clip of a
perturbed caption is scored against the original caption, as in the paper: for that it is the worse clip.
Unreadable clips are left out, and so are clips whose caption a scorer can't read; the report lists them.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.api.model import ModelVersion
from services.api.scoring import REWARD, CombinedScorers, Scorers
from services.client import OPTION_NAMES, ServiceOptions
from services.errors import MilongaError, invalid
from services.files import side_by_side
from services.local import open_scorers
from services.weights.uri import ResolvedModel, resolve
from training.data.examples import FileClip, check_readable, decode
from training.data.prompts import on_prompts, report_prompts
from training.data.store import Row, RowLog, batches, claim, finish, read_rows, write_rows
from training.loop.checks import Count, Parallel, Share, check_ranges
from training.loop.config import Plain, flatten
from training.loop.progress import progress
from training.preferences.candidates import candidates_digest, read_candidates
from training.preferences.sources import check_addresses

SCORES = "scores.jsonl"
_CLAP: Final = "reward's CLAP model"
FREE: Final = ("device", "batch", "in_flight", "server", "reward_server", "max_unreadable", *OPTION_NAMES)

_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoresConfig(ServiceOptions):
    """The scorers. The paper's ensemble is LAION's 630k-audioset-best and 630k-best, in this order.

    The settings of a connection are those of `server` and `reward_server`.
    """

    scorers: tuple[str, ...] = ("mini:clap-a", "mini:clap-b")
    """CLAP models in this process: URIs, each under its model's name, or NAME=URI; of a service, the names of
    those to use."""
    server: str | None = None
    """Address of a scoring service to use instead."""
    reward: str | None = None
    """URI of a reward model in this process; none: no rewards, unless `reward_server` gives them."""
    clap: str = "mini:clap-a"
    """URI of the CLAP model that `reward` was trained on."""
    reward_server: str | None = None
    """Address of a reward service to use instead."""
    device: str = "auto"
    """Device of the models in this process."""
    batch: Count = 16
    """Clips scored at once."""
    in_flight: Parallel = 4
    """Concurrent batches to services."""
    max_unreadable: Share = 0.05
    """Share of clips that may be unreadable before the stage is refused."""

    def __post_init__(self) -> None:
        ServiceOptions.__post_init__(self)
        if not self.scorers and self.reward is None and self.reward_server is None:
            raise ValueError("scorers is empty; name one at least, or a reward model")
        if len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"scorers names one twice: {', '.join(self.scorers)}")
        check_ranges(self)
        check_addresses(self, "server", "reward_server")


def scores_identity(config: ScoresConfig, candidates: Path, digests: Mapping[str, str]) -> dict[str, Plain]:
    """Return all that determines the result: settings, clips, and the weights of every scorer."""
    weights = {f"digest.{name}": digest for name, digest in digests.items()}
    return flatten(config) | {"input.candidates": candidates_digest(candidates)} | weights


def score_candidates(
    config: ScoresConfig,
    candidates: Path,
    output: Path,
    *,
    models: Mapping[str, ResolvedModel] | None = None,
    digests: Mapping[str, str] | None = None,
) -> Row:
    """Run the stage in `output`; return its report.

    Args:
        config: the settings.
        candidates: folder of the stage before.
        output: folder of this stage.
        models: what `resolve_scorers` returned, if it was called already.
        digests: what `scorer_digests` returned, if it was called already.

    Raises:
        InvalidInputError: more clips are unreadable than may be, or a service lacks a scorer.
        ModelError: a model was refused.
        MilongaError: a service failed; scores so far are kept.
    """
    models = resolve_scorers(config) if models is None else models
    digests = scorer_digests(config, models) if digests is None else digests
    names = [name for name in digests if name != REWARD]
    if report := claim(output, scores_identity(config, candidates, digests), FREE):
        return report
    rows = read_candidates(candidates)
    unreadable: dict[FileClip, str] = {}
    unread: list[str] = []
    path = output / SCORES
    with RowLog(path) as log, closing(_open(config, models)) as scorers:
        known = {row["id"] for row in log.rows}
        missing = [row for row in rows if row["id"] not in known]

        def work(part: Sequence[Row]) -> list[Row]:
            clips = _read(part, candidates, unreadable)
            found = _score(scorers, digests, clips)
            unread.extend(row["caption"] for (row, _), one in zip(clips, found, strict=True) if one is None)
            return [row for row in found if row is not None]

        services = config.server is not None or config.reward_server is not None
        with progress(total=len(rows), initial=len(rows) - len(missing), desc="scores", unit="clip") as bar:
            count = config.in_flight if services else 1
            for part, found in side_by_side(work, batches(missing, config.batch), count):
                for row in found:
                    log.append(row)
                bar.update(len(part))
                if max(len(unreadable), len(unread)) > config.max_unreadable * len(rows):
                    break
        scored = {row["id"]: row for row in log.rows}
    refuse_unreadable(unreadable, len(rows), config.max_unreadable)
    if len(unread) > config.max_unreadable * len(rows):
        raise invalid(
            "scorers",
            f"know no word for a sound in {len(unread)} captions, as {unread[0]!r}, of {len(rows)} clips; at "
            f"most {config.max_unreadable:.0%} may be left out; give other scorers or captions",
        )
    ordered = [scored[row["id"]] for row in rows if row["id"] in scored]
    write_rows(path, ordered)
    captions = {row["id"]: row["caption"] for row in rows}
    places = {row["caption"]: f"clip {row['id']}" for row in reversed(rows)}
    warnings = {captions[row["id"]]: row["warnings"] for row in ordered if row.get("warnings")}
    return finish(
        output,
        {
            "clips": len(rows),
            "scored": len(ordered),
            "scorers": [{"name": name, "digest": digests[name]} for name in names],
            "judges": digests,
            "mean": {
                name: float(np.mean([row["scores"][name] for row in ordered])) for name in names if ordered
            },
            "unreadable": {clip.name: reason for clip, reason in unreadable.items()},
            **report_prompts(places, warnings, ", ".join(digests)),
            "unread_captions": sorted(set(unread)),
        },
    )


def read_scores(folder: Path) -> dict[str, Row]:
    """Return the rows by the id of their clip."""
    return {row["id"]: row for row in read_rows(folder / SCORES)}


def refuse_unreadable(unreadable: Mapping[FileClip, str], total: int, limit: float) -> None:
    """Print which clips are left out. Raises `InvalidInputError` if they are more than `limit` of all."""
    if unreadable:
        check_readable(dict(sorted(unreadable.items(), key=lambda item: item[0].name)), total, limit)


def _read(
    part: Sequence[Row], folder: Path, unreadable: dict[FileClip, str]
) -> list[tuple[Row, tuple[NDArray[np.float32], int]]]:
    """Return the rows whose clips can be read, with their samples and rates."""
    found = []
    for row in part:
        clip = FileClip(path=folder / row["file"])
        try:
            found.append((row, decode(clip.path.read_bytes())))
        except (OSError, ValueError) as error:
            unreadable[clip] = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return found


def _score(
    scorers: Scorers, digests: Mapping[str, str], clips: Sequence[tuple[Row, tuple[NDArray[np.float32], int]]]
) -> list[Row | None]:
    """Return the row of each clip; None where a scorer can't read the caption."""
    if not clips:
        return []
    readable = [True] * len(clips)
    pairs = [(row["caption"], sound) for row, sound in clips]
    columns: dict[str, list[float]] = {}
    warnings: list[list[str]] = [[] for _ in clips]
    if names := [name for name in digests if name != REWARD]:
        scores = scorers.score_audio(pairs, scorers=names)
        for index, scorer in enumerate(scores.scorers):
            _check(digests, scorer.name, scorer.model)
            columns[scorer.name] = scores.values[:, index].tolist()
        warnings = [on_prompts(found) for found in scores.warnings]
        readable = [bool(row_S.all()) for row_S in scores.readable]
    rewards: list[float | None] = [None] * len(clips)
    if REWARD in digests:
        answer = scorers.compute_rewards(pairs)
        _check(digests, REWARD, answer.model)
        rewards = [reward.logit for reward in answer.rewards]
        both = zip(warnings, answer.rewards, strict=True)
        warnings = [on_prompts(found, reward.warnings) for found, reward in both]
        readable = [a and reward.readable for a, reward in zip(readable, answer.rewards, strict=True)]
    return [
        None
        if not readable[index]
        else {
            "id": row["id"],
            "scores": {name: column[index] for name, column in columns.items()},
            "reward": rewards[index],
            "warnings": warnings[index],
        }
        for index, (row, _) in enumerate(clips)
    ]


def _check(digests: Mapping[str, str], name: str, model: ModelVersion) -> None:
    if digests[name] != model.digest:
        raise MilongaError(
            f"{name} changed its weights from {digests[name]} to {model.digest}; "
            "pin the service and run again"
        )


def resolve_scorers(config: ScoresConfig) -> dict[str, ResolvedModel]:
    """Resolve the models in this process: scorers by name, the reward model, and the CLAP model under it.

    Raises `InvalidInputError` if two scorers have one name.
    """
    found: dict[str, ResolvedModel] = {}
    if config.server is None:
        for text in config.scorers:
            given = _NAMED.fullmatch(text)
            uri = given[2] if given else text
            model = resolve(uri)
            name = given[1] if given else model.identity.name
            if name in (*found, REWARD, _CLAP):
                raise invalid(
                    "scorers", f"{uri} would be called {name}, as another is; give it a name: NAME={uri}"
                )
            found[name] = model
    if config.reward is not None and config.reward_server is None:
        found |= {REWARD: resolve(config.reward), _CLAP: resolve(config.clap)}
    return found


def scorer_digests(config: ScoresConfig, models: Mapping[str, ResolvedModel]) -> dict[str, str]:
    """Return the digests of the weights that score, by the scorer's name; of the reward model by `REWARD`."""
    found = {name: model.digest for name, model in models.items() if name not in (REWARD, _CLAP)}
    if config.server is not None:
        with config.open(scoring=config.server) as client:
            served = client.versions()
        if unknown := [name for name in config.scorers if name not in served]:
            raise invalid("scorers", f"{', '.join(unknown)}: {config.server} serves {', '.join(served)}")
        found = {name: served[name].digest for name in config.scorers}
    if config.reward_server is not None:
        with config.open(reward=config.reward_server) as client:
            found[REWARD] = client.versions()[REWARD].digest
    elif REWARD in models:
        found[REWARD] = models[REWARD].digest
    return found


def _open(config: ScoresConfig, models: Mapping[str, ResolvedModel]) -> Scorers:
    """Load the models in this process, and connect to the services."""
    here = there = None
    if models:
        here = open_scorers(
            {name: model for name, model in models.items() if name not in (REWARD, _CLAP)},
            reward=models.get(REWARD),
            clap=models.get(_CLAP),
            device=config.device,
        )
    if config.server is not None or config.reward_server is not None:
        there = config.open(scoring=config.server, reward=config.reward_server, retries=4)
    return CombinedScorers(
        clap=here if config.server is None else there,
        reward=here if config.reward_server is None else there,
    )
