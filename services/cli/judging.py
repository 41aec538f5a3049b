"""Who judges clips: CLAP scorers and a reward model, in this process or through their services.

`milonga score` prints what they say; `milonga generate --candidates` keeps the clips that they like best.
Starts without torch, which only judges in this process need.
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
"""Clips that a judge is asked about in one call."""

JUDGES = "Judges"
"""The panel of the help in which the flags below lie."""
_PATH = re.compile(r"pairs\[(\d+)\](?:\.clip)?\.(\w+)")

ScorerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer",
        help="CLAP scorer in this process: its name and model URI (mini:NAME, file:PATH, hf:OWNER/NAME, "
        "laion:PATH). Can be given again. With --scoring: the name of one of the service's.",
        metavar="NAME=URI",
        show_default="clap-a=mini:clap-a and clap-b=mini:clap-b",
        rich_help_panel=JUDGES,
    ),
]
RewardOption = Annotated[
    str | None,
    typer.Option(
        "--reward",
        help="Reward model in this process: its model URI.",
        metavar="URI",
        show_default=EMBEDDED_REWARD,
        rich_help_panel=JUDGES,
    ),
]
ClapOption = Annotated[
    str | None,
    typer.Option(
        "--clap",
        help="CLAP model that --reward was trained on; it refuses another.",
        metavar="URI",
        show_default=EMBEDDED_CLAP,
        rich_help_panel=JUDGES,
    ),
]
ScoringOption = Annotated[
    str | None,
    typer.Option(
        "--scoring",
        help="Address of a scoring service, instead of scorers in this process.",
        metavar="ADDR",
        rich_help_panel=JUDGES,
    ),
]
RewardServerOption = Annotated[
    str | None,
    typer.Option(
        "--reward-server",
        help="Address of a reward service, instead of a reward model in this process.",
        metavar="ADDR",
        rich_help_panel=JUDGES,
    ),
]
TLSOption = Annotated[bool, typer.Option("--tls", help="Speak TLS to the services.")]
TLSCAOption = Annotated[
    Path | None, typer.Option(help="Authorities (PEM) that the servers' certificates must come from.")
]
TLSCertOption = Annotated[Path | None, typer.Option(help="Client certificate (PEM), for mTLS.")]
TLSKeyOption = Annotated[Path | None, typer.Option(help="Its private key (PEM).")]


def refuse(field: str, description: str) -> NoReturn:
    """Raise the error of one wrong flag."""
    raise InvalidInputError(FieldViolation(field, description))


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """How to reach services, by the flags of a command."""

    tls: client.TLS | None = None
    """TLS, or plaintext."""
    timeout: float | None = None
    """Seconds that a call may take."""

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            refuse("--timeout", f"is {self.timeout:g}, must be seconds above 0")

    @classmethod
    def of_flags(
        cls, *, tls: bool, ca: Path | None, cert: Path | None, key: Path | None, timeout: float | None
    ) -> "Connection":
        """Read the flags `--tls`, `--tls-ca`, `--tls-cert`, `--tls-key` and `--timeout`."""
        files = client.TLS(ca_file=ca, cert_file=cert, key_file=key) if tls or ca or cert or key else None
        return cls(tls=files, timeout=timeout)

    @property
    def is_default(self) -> bool:
        """Whether no flag said anything."""
        return self.tls is None and self.timeout is None

    @property
    def seconds(self) -> float:
        """Seconds that a call may take."""
        return client.DEFAULT_TIMEOUT_SECONDS if self.timeout is None else self.timeout


@dataclass(frozen=True, kw_only=True, slots=True)
class Judges:
    """Which judges are asked, and where they are; none of a kind is asked where neither place is given."""

    scorers: Mapping[str, str]
    """Scorers in this process: model URI by name."""
    scoring: str | None = None
    """Address of the scoring service."""
    names: tuple[str, ...] = ()
    """The service's scorers to ask; empty: all of them."""
    reward: str | None = None
    """Model URI of the reward model in this process."""
    clap: str = EMBEDDED_CLAP
    """Model URI of the CLAP model that `reward` stands on."""
    reward_server: str | None = None
    """Address of the reward service."""
    device: str = "auto"
    """Where the judges in this process run."""
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
                tls=self.connection.tls,
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


def choose_judges(
    *,
    scorer: Sequence[str] | None,
    reward: str | None,
    clap: str | None,
    scoring: str | None,
    reward_server: str | None,
    no_reward: bool = False,
    device: str | None = None,
    connection: Connection = Connection(),
) -> Judges:
    """Read the flags of the judges.

    Without an address, what is not said is the default, in this process. With one, a judge that is not named
    is not asked: whoever uses services need not have torch.

    Raises:
        InvalidInputError: flags that contradict each other.
    """
    for flag, address in (("--scoring", scoring), ("--reward-server", reward_server)):
        if address == "":
            refuse(flag, "is empty; give HOST:PORT")
    if reward_server is not None and (reward is not None or no_reward):
        refuse("--reward-server", "asks a service for rewards; leave out --reward and --no-reward with it")
    if no_reward and reward is not None:
        refuse("--no-reward", "asks no reward model; leave out --reward with it")
    if scoring is not None and any("=" in one for one in scorer or ()):
        refuse("--scorer", "is NAME=URI, and the service has its own; with --scoring give names alone")
    by_default = scoring is None and reward_server is None
    scorers = read_pairs("--scorer", scorer) if scorer and scoring is None else None
    if scorers is None:
        scorers = dict(EMBEDDED_SCORERS) if by_default else {}
    if reward is None and by_default and not no_reward:
        reward = EMBEDDED_REWARD
    elif reward is not None and reward.partition("#")[0] == "mini":
        # Where no sound is made, the family's name means this member, as for `milonga serve reward`.
        reward = reward.replace("mini", EMBEDDED_REWARD, 1)
    if clap is not None and reward is None:
        refuse(
            "--clap",
            "is what --reward was trained on; leave it out where no reward model runs in this process",
        )
    return Judges(
        scorers=scorers,
        scoring=scoring,
        names=tuple(scorer or ()) if scoring is not None else (),
        reward=reward,
        clap=clap or EMBEDDED_CLAP,
        reward_server=reward_server,
        device=device or "auto",
        connection=connection,
    )


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
