"""The catalogue of services: one row per service.

`milonga serve`, `milonga up`, `milonga doctor`, `milonga triton export` and the tests iterate over it. A
service is the folder ``services/NAME``, with `SERVICE` in ``serve.py`` and `SERVABLE` in ``triton.py``; this
module has only facts that need none of its imports.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

EMBEDDED_SCORERS: Final[Mapping[str, str]] = MappingProxyType(
    {"clap-a": "mini:clap-a", "clap-b": "mini:clap-b"}
)
"""Model URIs of the embedded CLAP models, by scorer."""
EMBEDDED_REWARD: Final = "mini:reward"
"""Model URI of the embedded reward model."""
EMBEDDED_CLAP: Final = "mini:clap-a"
"""Model URI of the CLAP model that `EMBEDDED_REWARD` was trained on."""
EMBEDDED_CAPTIONER: Final = "mini:captioner"
"""Model URI of the embedded captioner."""


def reward_uri(text: str) -> str:
    """Return `text`, the model URI of a reward model, with the family ``mini`` as `EMBEDDED_REWARD`."""
    return _of_family(text, EMBEDDED_REWARD)


def captioner_uri(text: str) -> str:
    """Return `text`, the model URI of a captioner, with the family ``mini`` as `EMBEDDED_CAPTIONER`."""
    return _of_family(text, EMBEDDED_CAPTIONER)


def _of_family(text: str, embedded: str) -> str:
    family, *pin = text.partition("#")
    return "".join((embedded, *pin)) if family == "mini" else text


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A setting of a service that names the weights to serve."""

    setting: str
    """Name of the setting. Its value is a model URI, or a table of names and model URIs."""
    embedded: str | Mapping[str, str]
    """Value for the embedded weights: the default of commands that run or export every service."""
    option: str
    """Option of those commands, without dashes; unique among all services."""
    export_option: str = ""
    """Option of `milonga triton export`, if it differs."""
    optional: bool = False
    """Whether an empty value means none."""
    help: str
    """Help of these options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceEntry:
    """A service."""

    name: str
    """Sub-command of `milonga serve`, folder in `services`, Deployment on Kubernetes."""
    summary: str
    """Help of `milonga serve NAME`: one line."""
    port: int
    """Default port."""
    rpc: str
    """Full name of its gRPC service."""
    model: str
    """Name of its model in the Open Inference Protocol."""
    weights: tuple[Weights, ...]
    """Settings that name its weights."""
    example: str
    """A command that calls it, with its address as ``{}``."""

    @property
    def listen(self) -> str:
        """Default address."""
        return f"127.0.0.1:{self.port}"

    def part(self, weights: Weights) -> str:
        """Return the name of `weights` among the service's: the setting, or the model's for ``model``."""
        return self.model if weights.setting == "model" else weights.setting


GENERATION: Final = ServiceEntry(
    name="generation",
    summary="Serve one model: prompts in, clips out (milonga.v1.GenerationService).",
    port=50051,
    rpc="milonga.v1.GenerationService",
    model="tango",
    weights=(
        Weights(
            setting="model",
            embedded="mini",
            option="generation",
            export_option="model",
            help="Model that generates audio.",
        ),
    ),
    example="milonga generate 'A dog barks' --server {}",
)

SCORING: Final = ServiceEntry(
    name="scoring",
    summary="Serve CLAP scores: clips and prompts in, how well they match out (milonga.v1.ScoringService).",
    port=50052,
    rpc="milonga.v1.ScoringService",
    model="clap",
    weights=(
        Weights(
            setting="scorers",
            embedded=EMBEDDED_SCORERS,
            option="scorer",
            help="Scorer: its name and its CLAP model. Can be repeated.",
        ),
    ),
    example="milonga score 'A dog barks' clip.wav --scoring {}",
)

REWARD: Final = ServiceEntry(
    name="reward",
    summary="Serve a reward model: clips and prompts in, preferences out (milonga.v1.RewardService).",
    port=50053,
    rpc="milonga.v1.RewardService",
    model="reward",
    weights=(
        Weights(setting="model", embedded=EMBEDDED_REWARD, option="reward", help="Reward model."),
        Weights(
            setting="clap",
            embedded=EMBEDDED_CLAP,
            option="clap",
            help="CLAP model that the reward model was trained on; any other is refused.",
        ),
    ),
    example="milonga score 'A dog barks' clip.wav --reward-server {}",
)

CAPTIONING: Final = ServiceEntry(
    name="captioning",
    summary="Serve a captioner: clips in, sentences out (milonga.v1.CaptioningService).",
    port=50054,
    rpc="milonga.v1.CaptioningService",
    model="caption",
    weights=(
        Weights(setting="model", embedded=EMBEDDED_CAPTIONER, option="captioner", help="Captioner."),
        Weights(
            setting="clap",
            embedded=EMBEDDED_CLAP,
            option="captioner-clap",
            optional=True,
            help="CLAP model that chooses among the captioner's candidates; empty: none.",
        ),
    ),
    example="milonga caption clip.wav --server {}",
)

EXPLANATION: Final = ServiceEntry(
    name="explanation",
    summary="Serve explanations: prompts in, which word made which sound (milonga.v1.ExplanationService).",
    port=50055,
    rpc="milonga.v1.ExplanationService",
    model="explain",
    weights=(
        Weights(
            setting="model",
            embedded="mini",
            option="explained",
            help="Generator whose clips are explained.",
        ),
    ),
    example="milonga explain 'A dog barks then a siren wails' --server {} -o why.html",
)

CATALOGUE: Final[Mapping[str, ServiceEntry]] = MappingProxyType(
    {entry.name: entry for entry in (GENERATION, SCORING, REWARD, CAPTIONING, EXPLANATION)}
)
"""All services by name, in the order of their ports."""
