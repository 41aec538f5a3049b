"""Every clip against its caption: CLAP scores by several scorers, and the reward where it is wanted.

Writes ``scores.jsonl``: `id` of the clip, `scores` by scorer, `reward` (a logit, or null). A clip that was
made of a perturbed caption is judged against the caption itself, as the paper does: that is what it is a
worse clip of. Clips that can't be read are left out, and listed in the report.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.client import AudioClient
from services.errors import MilongaError
from services.weights.uri import ModelURI, resolve
from training.data.examples import FileClip, decode
from training.data.store import (
    Row,
    RowLog,
    batches,
    claim,
    finish,
    invalid,
    read_rows,
    side_by_side,
    write_rows,
)
from training.loop.config import Plain, flatten
from training.loop.progress import progress
from training.preferences.candidates import candidates_digest, read_candidates
from training.preferences.scorers import LoadedReward, LoadedScorer, load_clap_scorer, load_reward_scorer

SCORES = "scores.jsonl"
REWARD = "reward"
"""The reward model's name among the judges."""
FREE: Final = ("device", "batch", "in_flight", "timeout", "server", "reward_server", "max_unreadable")

_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoresConfig:
    """Who judges. The paper's ensemble is LAION's 630k-audioset-best and 630k-best, in this order."""

    scorers: tuple[str, ...] = ("mini:clap-a", "mini:clap-b")
    """CLAP models in this process: URIs, each under its model's name, or NAME=URI; of a service, the names of
    those that are asked."""
    server: str | None = None
    """Address of a scoring service that is asked instead."""
    reward: str | None = None
    """URI of a reward model in this process; none: no rewards, unless `reward_server` gives them."""
    clap: str = "mini:clap-a"
    """URI of the CLAP model that `reward` stands on."""
    reward_server: str | None = None
    """Address of a reward service that is asked instead."""
    device: str = "auto"
    """Of the models in this process."""
    batch: int = 16
    """Clips judged at once."""
    in_flight: int = 4
    """Batches on their way to services."""
    timeout: float = 600.0
    """Seconds that a service may take for a batch."""
    max_unreadable: float = 0.05
    """Share of clips that may be unreadable before the stage is refused."""

    def __post_init__(self) -> None:
        if not self.scorers and self.reward is None and self.reward_server is None:
            raise ValueError("scorers is empty; name one at least, or a reward model")
        if len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"scorers names one twice: {', '.join(self.scorers)}")
        for name in ("batch", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Heard:
    """A clip on its way to the judges."""

    row: Row
    content: bytes
    waveform: NDArray[np.float32]
    sampling_rate: int


def scores_identity(
    config: ScoresConfig, candidates: Path, digests: Mapping[str, str] | None = None
) -> dict[str, Plain]:
    """What the outcome depends on: settings, clips, and the weights of every judge (`digests`, if known)."""
    weights = {f"digest.{name}": digest for name, digest in (digests or _digests(config)).items()}
    return flatten(config) | {"input.candidates": candidates_digest(candidates)} | weights


def score_candidates(config: ScoresConfig, candidates: Path, output: Path) -> Row:
    """Run the stage in `output`; return its report. `candidates` is the folder of the stage before.

    Raises:
        InvalidInputError: more clips are unreadable than may be, or a service lacks a scorer.
        ModelError: a model was refused.
        MilongaError: a service failed; what was judged is kept.
    """
    digests = _digests(config)
    names = [name for name in digests if name != REWARD]
    if report := claim(output, scores_identity(config, candidates, digests), FREE):
        return report
    rows = read_candidates(candidates)
    unreadable: dict[FileClip, str] = {}
    path = output / SCORES
    with RowLog(path) as log, _open_judges(config, digests) as judges:
        known = {row["id"] for row in log.rows}
        missing = [row for row in rows if row["id"] not in known]

        def work(part: Sequence[Row]) -> list[Row]:
            heard = _read(part, candidates, unreadable)
            return judges.judge(heard) if heard else []

        services = config.server is not None or config.reward_server is not None
        with progress(total=len(rows), initial=len(rows) - len(missing), desc="scores", unit="clip") as bar:
            count = config.in_flight if services else 1
            for part, found in side_by_side(work, batches(missing, config.batch), count):
                for row in found:
                    log.append(row)
                bar.update(len(part))
                if len(unreadable) > config.max_unreadable * len(rows):
                    break
        scored = {row["id"]: row for row in log.rows}
    refuse_unreadable(unreadable, len(rows), config.max_unreadable)
    ordered = [scored[row["id"]] for row in rows if row["id"] in scored]
    write_rows(path, ordered)
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
        },
    )


def read_scores(folder: Path) -> dict[str, Row]:
    """The rows by the id of their clip."""
    return {row["id"]: row for row in read_rows(folder / SCORES)}


def refuse_unreadable(unreadable: Mapping[FileClip, str], total: int, limit: float) -> None:
    """Tell which clips are left out. Raises `InvalidInputError` where they are more than `limit` of all."""
    if unreadable:
        # Inside: it brings accelerate along, and clips that can't be read are rare.
        from training.data.examples import check_readable

        check_readable(dict(sorted(unreadable.items(), key=lambda item: item[0].name)), total, limit)


def _read(part: Sequence[Row], folder: Path, unreadable: dict[FileClip, str]) -> list[_Heard]:
    heard = []
    for row in part:
        clip = FileClip(path=folder / row["file"])
        try:
            content = clip.path.read_bytes()
            waveform, rate = decode(content)
        except (OSError, ValueError) as error:
            unreadable[clip] = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            continue
        heard.append(_Heard(row=row, content=content, waveform=waveform, sampling_rate=rate))
    return heard


class _Judges(AbstractContextManager["_Judges"]):
    """Scorers and reward model, here or there."""

    def __init__(
        self,
        config: ScoresConfig,
        scorers: Mapping[str, LoadedScorer],
        reward: LoadedReward | None,
        client: AudioClient | None,
        digests: Mapping[str, str],
    ) -> None:
        self._config, self._scorers, self._reward, self._client = config, scorers, reward, client
        self._digests = digests

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()

    def judge(self, heard: Sequence[_Heard]) -> list[Row]:
        """The row of each clip."""
        prompts = [one.row["caption"] for one in heard]
        columns = self._scores(prompts, heard)
        rewards = self._rewards(prompts, heard)
        return [
            {
                "id": one.row["id"],
                "scores": {name: column[index] for name, column in columns.items()},
                "reward": rewards[index] if rewards else None,
            }
            for index, one in enumerate(heard)
        ]

    def _scores(self, prompts: Sequence[str], heard: Sequence[_Heard]) -> dict[str, list[float]]:
        names = [name for name in self._digests if name != REWARD]
        if not names:
            return {}
        if self._config.server is None:
            return {name: _cosines(self._scorers[name], prompts, heard) for name in names}
        assert self._client is not None
        pairs = [(prompt, one.content) for prompt, one in zip(prompts, heard, strict=True)]
        scores = self._client.score_audio(pairs, scorers=names)
        for scorer in scores.scorers:
            self._check(scorer.name, scorer.model.digest)
        return {name: scores.values[:, index].tolist() for index, name in enumerate(names)}

    def _rewards(self, prompts: Sequence[str], heard: Sequence[_Heard]) -> list[float]:
        if self._reward is not None:
            model = self._reward.model
            clips = [model.prepare(one.waveform, one.sampling_rate) for one in heard]
            logits: list[float] = model.reward(prompts, clips).tolist()
            return logits
        if self._config.reward_server is None:
            return []
        assert self._client is not None
        pairs = [(prompt, one.content) for prompt, one in zip(prompts, heard, strict=True)]
        rewards = self._client.compute_rewards(pairs)
        self._check(REWARD, rewards.model.digest)
        return [reward.logit for reward in rewards.rewards]

    def _check(self, name: str, digest: str) -> None:
        if self._digests[name] != digest:
            raise MilongaError(
                f"{name} changed its weights from {self._digests[name]} to {digest}; pin the service and "
                "run again"
            )


def _cosines(scorer: LoadedScorer, prompts: Sequence[str], heard: Sequence[_Heard]) -> list[float]:
    model = scorer.model
    windows = [model.prepare(one.waveform, one.sampling_rate) for one in heard]
    cosines_B: torch.Tensor = (model.embed_text(prompts) * model.embed_windows(windows)).sum(-1)
    values: list[float] = cosines_B.clamp(-1.0, 1.0).tolist()
    return values


def _open_judges(config: ScoresConfig, digests: Mapping[str, str]) -> _Judges:
    scorers: dict[str, LoadedScorer] = {}
    if config.server is None:
        scorers = {name: load_clap_scorer(uri, config.device) for name, uri in _named(config).items()}
    reward = None
    if config.reward is not None and config.reward_server is None:
        reward = load_reward_scorer(config.reward, config.clap, config.device)
    client = None
    if config.server is not None or config.reward_server is not None:
        client = AudioClient(
            scoring=config.server, reward=config.reward_server, timeout=config.timeout, retries=4
        )
    return _Judges(config, scorers, reward, client, digests)


def _named(config: ScoresConfig) -> dict[str, str]:
    """URI by name, of scorers in this process. Raises `InvalidInputError` for one name of two."""
    found: dict[str, str] = {}
    for text in config.scorers:
        given = _NAMED.fullmatch(text)
        uri = given[2] if given else text
        name = given[1] if given else resolve(ModelURI.parse(uri)).identity.name
        if name in found or name == REWARD:
            raise invalid(
                "scorers", f"{uri} would be called {name}, as another is; give it a name: NAME={uri}"
            )
        found[name] = uri
    return found


def _digests(config: ScoresConfig) -> dict[str, str]:
    """The digest of every judge's weights, by the scorer's name, and of the reward model by `REWARD`."""
    found: dict[str, str] = {}
    scoring = (
        nullcontext() if config.server is None else AudioClient(scoring=config.server, timeout=config.timeout)
    )
    with scoring as client:
        if client is None:
            found = {name: resolve(ModelURI.parse(uri)).digest for name, uri in _named(config).items()}
        else:
            served = {scorer.name: scorer.model.digest for scorer in client.list_scorers().scorers}
            if unknown := [name for name in config.scorers if name not in served]:
                raise invalid("scorers", f"{', '.join(unknown)}: {config.server} serves {', '.join(served)}")
            found = {name: served[name] for name in config.scorers}
    if config.reward_server is not None:
        with AudioClient(reward=config.reward_server, timeout=config.timeout) as rewarding:
            found[REWARD] = rewarding.get_reward_model().model.digest
    elif config.reward is not None:
        found[REWARD] = resolve(ModelURI.parse(config.reward)).digest
    return found
