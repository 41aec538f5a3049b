"""The scorers and the reward model of a command, in this process or through their services.

`milonga score` prints their scores; `milonga generate --candidates` keeps the clips with the highest. Starts
without torch, which only models in this process need.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from services import client
from services.api.scoring import CombinedScorers, Scorers
from services.catalogue import EMBEDDED_CLAP, EMBEDDED_REWARD, EMBEDDED_SCORERS
from services.cli.options import read_pairs
from services.errors import FieldViolation, InvalidInputError, ModelError

if TYPE_CHECKING:
    from services.weights.uri import ResolvedModel

MAX_BATCH = 16
"""Clips that are scored in one call."""

PANEL = "Scorers"
"""Panel of the help."""
_PATH = re.compile(r"pairs\[(\d+)\](?:\.clip)?\.(\w+)")


def refuse(field: str, description: str) -> NoReturn:
    """Raise the error of one wrong flag."""
    raise InvalidInputError(FieldViolation(field, description))


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """The options that say how services are reached."""

    tls: Annotated[bool, typer.Option("--tls", help="Use TLS to reach the services.")] = False
    tls_ca: Annotated[
        Path | None, typer.Option(help="Authorities (PEM) that the servers' certificates must come from.")
    ] = None
    tls_cert: Annotated[Path | None, typer.Option(help="Client certificate (PEM), for mTLS.")] = None
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            help="With a service: seconds that a call may take, waiting included.",
            show_default=f"{client.DEFAULT_TIMEOUT_SECONDS:g}",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            refuse("--timeout", f"is {self.timeout:g}, must be seconds above 0")

    @property
    def is_default(self) -> bool:
        """Return whether none of the options was given."""
        return self == Connection()

    @property
    def files(self) -> client.TLS | None:
        """Return how TLS is used; None for plaintext."""
        if self == Connection(timeout=self.timeout):
            return None
        return client.TLS(ca_file=self.tls_ca, cert_file=self.tls_cert, key_file=self.tls_key)

    @property
    def seconds(self) -> float:
        """Return the seconds that a call may take."""
        return client.DEFAULT_TIMEOUT_SECONDS if self.timeout is None else self.timeout


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerOptions:
    """The options that name scorers and a reward model."""

    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="CLAP scorer in this process: its name and model URI (mini:NAME, file:PATH, hf:OWNER/NAME, "
            "laion:PATH). Can be given again. With --scoring: the name of one of the service's.",
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
            help="CLAP model that --reward was trained on; it refuses another.",
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
        """Return the first of the named options that was given; empty if none was."""
        options = (f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None)
        return next(options, "")

    def choose(
        self, connection: Connection, *, device: str | None = None, no_reward: bool = False
    ) -> "ScorerSources":
        """Return which scorers are used.

        Without an address, what is not given is the default, in this process. With one, a scorer that is not
        named is not used: a user of services need not have torch.

        Raises:
            InvalidInputError: options that contradict each other.
        """
        reward, is_local = self.reward, self.scoring is None and self.reward_server is None
        for flag, address in (("--scoring", self.scoring), ("--reward-server", self.reward_server)):
            if address == "":
                refuse(flag, "is empty; give HOST:PORT")
        if self.reward_server is not None and (reward is not None or no_reward):
            refuse("--reward-server", "gives rewards; leave out --reward and --no-reward with it")
        if no_reward and reward is not None:
            refuse("--no-reward", "leaves the reward model out; leave out --reward with it")
        if self.scoring is not None and any("=" in one for one in self.scorer or ()):
            refuse("--scorer", "is NAME=URI, and the service has its own; with --scoring give names alone")
        if reward is None and is_local and not no_reward:
            reward = EMBEDDED_REWARD
        elif reward is not None and reward.partition("#")[0] == "mini":
            # Where no sound is generated, the family's name means this member, as in `milonga serve reward`.
            reward = reward.replace("mini", EMBEDDED_REWARD, 1)
        if self.clap is not None and reward is None:
            refuse("--clap", "goes with --reward; leave it out where no reward model runs in this process")
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
    """Which scorers and reward model are used, and where they run; of a kind that has no place, none."""

    scorers: Mapping[str, str]
    """Scorers in this process: model URI by name."""
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
    connection: Connection = Connection()
    """How to reach the services."""

    @property
    def are_here(self) -> bool:
        """Return whether any model runs in this process."""
        return bool(self.scorers) or self.reward is not None

    @property
    def by_clap(self) -> bool:
        """Return whether there are scorers."""
        return bool(self.scorers) or self.scoring is not None

    @property
    def by_reward(self) -> bool:
        """Return whether there is a reward model."""
        return self.reward is not None or self.reward_server is not None

    @property
    def source(self) -> str:
        """Return where scores come from, as a record keeps it."""
        scorers = [f"{name}={uri}" for name, uri in self.scorers.items()]
        rewards = [] if self.reward is None else [f"{self.reward} on {self.clap}"]
        served = [f"{self.scoring} {' '.join(self.names)}".strip()] if self.scoring is not None else []
        return ", ".join([*scorers, *served, *rewards, *filter(None, [self.reward_server])])

    def open(self) -> Scorers:
        """Load the models and connect to the services.

        Raises:
            InvalidInputError: a URI is none, in the words of the flag.
            ModelError: a model was refused.
        """
        here = self._open_local() if self.are_here else None
        there = None
        if self.scoring is not None or self.reward_server is not None:
            there = client.AudioClient(
                scoring=self.scoring,
                reward=self.reward_server,
                tls=self.connection.files,
                timeout=self.connection.seconds,
            )
        return CombinedScorers(
            clap=there if self.scoring is not None else here if self.by_clap else None,
            reward=there if self.reward_server is not None else here if self.by_reward else None,
        )

    def _open_local(self) -> Scorers:
        # Torch is seconds of import: only where models run in this process.
        from services.local import open_scorers
        from services.weights.uri import ModelURI, resolve

        texts = {f"--scorer {name}": uri for name, uri in self.scorers.items()}
        if self.reward is not None:
            texts |= {"--reward": self.reward, "--clap": self.clap}
        uris: dict[str, ModelURI] = {}
        faults: list[FieldViolation] = []
        for flag, text in texts.items():
            try:
                with _naming(flag):
                    uris[flag] = ModelURI.parse(text)
            except InvalidInputError as error:
                faults += error.violations
        if faults:
            raise InvalidInputError(*faults)
        if "--clap" in uris and uris["--clap"].scheme == "laion-clap":
            refuse("--clap", f"is {self.clap[:80]!r}, which gives embeddings and no tokens; give laion:PATH")
        models: dict[str, ResolvedModel] = {}
        for flag, uri in uris.items():
            with _naming(flag):
                models[flag] = resolve(uri)
        return open_scorers(
            {name: models[f"--scorer {name}"] for name in self.scorers},
            reward=models.get("--reward"),
            clap=models.get("--clap"),
            device=self.device,
            naming=lambda role: _naming(f"--scorer {role}" if role in self.scorers else f"--{role}"),
        )


@contextlib.contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Name the flag in errors of the model that it names."""
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
    """Spell ``pairs[2].clip.audio`` as the third of `names`, and ``scorers[0]`` as the flag."""
    return InvalidInputError(*(_named(violation, names) for violation in error.violations))


def _named(violation: FieldViolation, names: Sequence[str]) -> FieldViolation:
    if violation.field.startswith("scorers"):
        return FieldViolation("--scorer", violation.description)
    found = _PATH.fullmatch(violation.field)
    if found is None or int(found[1]) >= len(names):
        return violation
    what = "" if found[2] == "audio" else f"{found[2]} "
    return FieldViolation(names[int(found[1])], f"{what}{violation.description}")
