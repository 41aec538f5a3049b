"""Read the registry's versions and the ledger of promotions, to show them.

`training.promotion.ledger` writes the ledger: runs of an MLflow experiment, with tags.
"""

import datetime
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from services.weights.registry import DIGEST_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

LEDGER: Final = "milonga-promotions"
"""Experiment whose runs are promotions."""
LEDGER_TAG: Final = "milonga.promotion."
"""Prefix of the tags of such a run."""
_MOST: Final = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedVersion:
    """A registered version, as text."""

    name: str
    version: str
    aliases: tuple[str, ...]
    digest: str
    created: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedPromotion:
    """An entry of the ledger, as text."""

    started: str
    kind: str
    before: str
    after: str
    outcome: str
    who: str
    reason: str


def read_versions(client: "MlflowClient") -> list[ListedVersion]:
    """Return the newest registered versions of all models, with the aliases that point to them."""
    aliases: dict[tuple[str, str], list[str]] = {}
    for model in client.search_registered_models(max_results=_MOST):
        for alias, version in model.aliases.items():
            aliases.setdefault((model.name, str(version)), []).append(alias)
    found = client.search_model_versions(max_results=_MOST, order_by=["creation_timestamp DESC"])
    return [
        ListedVersion(
            name=one.name,
            version=str(one.version),
            aliases=tuple(sorted(aliases.get((one.name, str(one.version)), ()))),
            digest=one.tags.get(DIGEST_TAG, ""),
            created=_time(one.creation_timestamp),
        )
        for one in found
    ]


def read_promotions(client: "MlflowClient") -> list[ListedPromotion]:
    """Return the newest entries of the ledger, newest first."""
    experiment = client.get_experiment_by_name(LEDGER)
    if experiment is None:
        return []
    runs = client.search_runs(
        [experiment.experiment_id], order_by=["attributes.start_time DESC"], max_results=_MOST
    )
    found = []
    for run in runs:
        tags = {name.removeprefix(LEDGER_TAG): value for name, value in run.data.tags.items()}
        if tags.get("to"):
            found.append(
                ListedPromotion(
                    started=_time(run.info.start_time),
                    kind=tags.get("kind", ""),
                    before=_pin(tags.get("from", "")),
                    after=_pin(tags["to"]),
                    outcome=tags.get("outcome") or f"unfinished ({tags.get('phase', 'begun')})",
                    who=tags.get("who", ""),
                    reason=tags.get("reason", ""),
                )
            )
    return found


def _pin(uri: str) -> str:
    return uri.partition("#")[0].removeprefix("models:/") or "nothing"


def _time(milliseconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(milliseconds / 1000, tz=datetime.UTC):%Y-%m-%d %H:%M}"
