"""Options and sources of CLAP scorers and reward models, in this process or through services.

Used by `milonga score` and `milonga generate --candidates`. Imports torch only to run models in this process.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from services.api.scoring import CombinedScorers, Scorers
from services.catalogue import EMBEDDED_CLAP, EMBEDDED_REWARD, EMBEDDED_SCORERS, reward_uri
from services.cli.options import check_address, read_pairs
from services.client import ServiceOptions
from services.errors import FieldViolation, InvalidInputError, ModelError, invalid

if TYPE_CHECKING:
    from services.weights.uri import ResolvedModel

MAX_BATCH = 16
"""Maximum number of clips in one scoring call."""

PANEL = "Scorers"
"""Panel of these options in the help."""
_PATH = re.compile(r"pairs\[(\d+)\](?:\.clip)?\.(\w+)")


def refuse(field: str, description: str) -> NoReturn:
    """Raise `InvalidInputError` for one option."""
    raise invalid(field, description)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerOptions:
    """Options that choose CLAP scorers and a reward model."""

    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="CLAP scorer in this process: its name and model URI (mini:NAME, file:PATH, hf:OWNER/NAME, "
            "laion:PATH). Can be repeated. With --scoring: the name of one of the service's scorers.",
            metavar="NAME=URI",
            show_default="clap-a=mini:clap-a and clap-b=mini:clap-b",
            rich_help_panel=PANEL,
        ),
    ] = None
    reward: Annotated[
        str | None,
        typer.Option(
            help="Reward model in this process: its model URI.",
            metavar="URI",
            show_default=EMBEDDED_REWARD,
            rich_help_panel=PANEL,
        ),
    ] = None
    clap: Annotated[
        str | None,
        typer.Option(
            help="CLAP model that --reward was trained on; any other is refused.",
            metavar="URI",
            show_default=EMBEDDED_CLAP,
            rich_help_panel=PANEL,
        ),
    ] = None
    scoring: Annotated[
        str | None,
        typer.Option(
            help="Address of a scoring service, instead of scorers in this process.",
            metavar="ADDR",
            rich_help_panel=PANEL,
        ),
    ] = None
    reward_server: Annotated[
        str | None,
        typer.Option(
            help="Address of a reward service, instead of a reward model in this process.",
            metavar="ADDR",
            rich_help_panel=PANEL,
        ),
    ] = None

    def given(self, *names: str) -> str:
        """Return the first of the options `names` that was given, as typed; an empty string if none was."""
        options = (f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None)
        return next(options, "")

    def choose(
        self, connection: ServiceOptions, *, device: str | None = None, no_reward: bool = False
    ) -> "ScorerSources":
        """Return the scorers and the reward model to use.

        Without the address of a service, options that are not given have their defaults, in this process.
        With an address they have none, so that a user of services need not have torch.

        Raises:
            InvalidInputError: options contradict each other.
        """
        reward, is_local = self.reward, self.scoring is None and self.reward_server is None
        for flag, address in (("--scoring", self.scoring), ("--reward-server", self.reward_server)):
            check_address(flag, address)
        if self.reward_server is not None and (reward is not None or no_reward):
            refuse("--reward-server", "can't be combined with --reward or --no-reward; leave them out")
        if no_reward and reward is not None:
            refuse("--no-reward", "can't be combined with --reward; leave one of the two out")
        if self.scoring is not None and any("=" in one for one in self.scorer or ()):
            refuse("--scorer", "is NAME=URI, but with --scoring the service has the models; give names only")
        if reward is None and is_local and not no_reward:
            reward = EMBEDDED_REWARD
        elif reward is not None:
            reward = reward_uri(reward)
        if self.clap is not None and reward is None:
            refuse("--clap", "needs --reward; leave it out if no reward model runs in this process")
        scorers = dict(EMBEDDED_SCORERS) if is_local else {}
        if self.scorer and self.scoring is None:
            scorers = read_pairs("--scorer", self.scorer)
        return ScorerSources(
            scorers=scorers,
            scoring=self.scoring,
            names=tuple(self.scorer or ()) if self.scoring is not None else (),
            reward=reward,
            clap=self.clap or EMBEDDED_CLAP,
            reward_server=self.reward_server,
            device=device or "auto",
            connection=connection,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerSources:
    """The CLAP scorers and the reward model to use: in this process, through a service, or none."""

    scorers: Mapping[str, str]
    """Scorers in this process: model URIs by name."""
    scoring: str | None = None
    """Address of the scoring service."""
    names: tuple[str, ...] = ()
    """The service's scorers to use; empty: all of them."""
    reward: str | None = None
    """Model URI of the reward model in this process."""
    clap: str = EMBEDDED_CLAP
    """Model URI of the CLAP model that `reward` was trained on."""
    reward_server: str | None = None
    """Address of the reward service."""
    device: str = "auto"
    """Device of the models in this process."""
    connection: ServiceOptions = field(default_factory=ServiceOptions)
    """How to reach the services."""

    @property
    def are_here(self) -> bool:
        """Whether any model runs in this process."""
        return bool(self.scorers) or self.reward is not None

    @property
    def by_clap(self) -> bool:
        """Whether there are CLAP scorers."""
        return bool(self.scorers) or self.scoring is not None

    @property
    def by_reward(self) -> bool:
        """Whether there is a reward model."""
        return self.reward is not None or self.reward_server is not None

    @property
    def source(self) -> str:
        """The models' URIs and the services' addresses, for a clip's record."""
        scorers = [f"{name}={uri}" for name, uri in self.scorers.items()]
        rewards = [] if self.reward is None else [f"{self.reward} on {self.clap}"]
        served = [f"{self.scoring} {' '.join(self.names)}".strip()] if self.scoring is not None else []
        return ", ".join([*scorers, *served, *rewards, *filter(None, [self.reward_server])])

    def open(self) -> Scorers:
        """Load the models and connect to the services.

        Raises:
            InvalidInputError: a model URI is invalid; names the option.
            ModelError: a model was refused.
        """
        local = self._open_local() if self.are_here else None
        remote = None
        if self.scoring is not None or self.reward_server is not None:
            remote = self.connection.open(scoring=self.scoring, reward=self.reward_server)
        return CombinedScorers(
            clap=remote if self.scoring is not None else local if self.by_clap else None,
            reward=remote if self.reward_server is not None else local if self.by_reward else None,
        )

    def _open_local(self) -> Scorers:
        # Imported here: importing torch takes seconds, and only models in this process need it.
        from services.local import open_scorers
        from services.weights.uri import ModelURI, resolve

        texts = {f"--scorer {name}": uri for name, uri in self.scorers.items()}
        if self.reward is not None:
            texts |= {"--reward": self.reward, "--clap": self.clap}
        uris: dict[str, ModelURI] = {}
        faults: list[FieldViolation] = []
        for flag, text in texts.items():
            try:
                with naming_option(flag):
                    uris[flag] = ModelURI.parse(text)
            except InvalidInputError as error:
                faults += error.violations
        if faults:
            raise InvalidInputError(*faults)
        if "--clap" in uris and uris["--clap"].scheme == "laion-clap":
            refuse(
                "--clap", f"is {self.clap[:80]!r}, which returns no tokens, only embeddings; give laion:PATH"
            )
        models: dict[str, ResolvedModel] = {}
        for flag, uri in uris.items():
            with naming_option(flag):
                models[flag] = resolve(uri)
        return open_scorers(
            {name: models[f"--scorer {name}"] for name in self.scorers},
            reward=models.get("--reward"),
            clap=models.get("--clap"),
            device=self.device,
            naming=lambda role: naming_option(f"--scorer {role}" if role in self.scorers else f"--{role}"),
        )


@contextlib.contextmanager
def naming_option(flag: str) -> Iterator[None]:
    """Put `flag` into errors about its model: as the field, or in front of the message."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(
            *(
                FieldViolation("--device" if fault.field == "device" else flag, fault.description)
                for fault in error.violations
            )
        ) from error
    except ModelError as error:
        raise type(error)(f"{flag}: {error}") from error


def name_clips(error: InvalidInputError, names: Sequence[str]) -> InvalidInputError:
    """Return `error` with ``names[2]`` for the field ``pairs[2].clip.audio``, --scorer for ``scorers[0]``."""
    return InvalidInputError(*(_named(violation, names) for violation in error.violations))


def _named(violation: FieldViolation, names: Sequence[str]) -> FieldViolation:
    if violation.field.startswith("scorers"):
        return FieldViolation("--scorer", violation.description)
    found = _PATH.fullmatch(violation.field)
    if found is None or int(found[1]) >= len(names):
        return violation
    what = "" if found[2] == "audio" else f"{found[2]} "
    return FieldViolation(names[int(found[1])], f"{what}{violation.description}")
