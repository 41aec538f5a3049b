"""Load the models of the captioning service, and connect it to the scoring service that refines, if any."""

from collections.abc import Mapping
from dataclasses import dataclass

from services.captioning.model import CaptionModel, scorer_of
from services.captioning.refine import ScoringRefiner
from services.captioning.settings import CLAP, CaptioningSettings
from services.captioning.worker import CaptionWorker
from services.catalogue import CAPTIONING
from services.client import TLS, AsyncAudioClient
from services.errors import FieldViolation, InvalidInputError
from services.models.captioner.model import Captioner
from services.weights.loading import load_embedding_model
from services.weights.uri import ResolvedModel, naming


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedCaptioner:
    """What the service holds in memory."""

    worker: CaptionWorker
    refiner: ScoringRefiner | None
    """The scoring service that chooses among candidates, if no CLAP model here does."""

    async def close(self) -> None:
        """Close the worker and the connection."""
        await self.worker.batcher.close()
        if self.refiner is not None:
            await self.refiner.close()


def load(settings: CaptioningSettings, found: Mapping[str, ResolvedModel]) -> LoadedCaptioner:
    """Load the captioner and the CLAP model, if any.

    Args:
        settings: the service's settings.
        found: resolved models, keyed as `model_uris` keys them.

    Raises:
        ModelError: a model was refused.
        InvalidInputError: the device does not exist, or the scoring service's address or file is invalid.
    """
    refiner = connect(settings)
    model = load_model(
        found[CAPTIONING.model],
        found.get(CLAP),
        device=settings.device,
        dtype=settings.dtype,
        sends=refiner is not None,
    )
    worker = CaptionWorker(model, found[CAPTIONING.model].folder, settings)
    return LoadedCaptioner(worker=worker, refiner=refiner)


def load_model(
    captioner: ResolvedModel,
    clap: ResolvedModel | None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    sends: bool = False,
) -> CaptionModel:
    """Load a captioner, and the CLAP model that refines, if any.

    Args:
        captioner: the captioner.
        clap: the CLAP model; None: none in this process.
        device: torch's name of a device, or ``auto``.
        dtype: float type of the language model.
        sends: see `CaptionModel`.

    Raises:
        ModelError: a model was refused; the message about CLAP begins with its setting.
        InvalidInputError: the device does not exist.
    """
    embedder = scorer = None
    if clap is not None:
        with naming(CLAP):
            embedder = load_embedding_model(clap, device)
        scorer = scorer_of(embedder, clap, CLAP)
    model = Captioner.from_pretrained(captioner.folder, device=device, dtype=dtype)
    return CaptionModel(model, captioner.identity, clap=embedder, scorer=scorer, sends=sends)


def connect(settings: CaptioningSettings) -> ScoringRefiner | None:
    """Return the connection to the scoring service of the settings; None without one.

    Raises:
        InvalidInputError: its address, the file of authorities or the token is invalid.
    """
    if settings.scoring is None:
        return None
    tls = None if settings.scoring_ca_file is None else TLS(ca_file=settings.scoring_ca_file)
    try:
        client = AsyncAudioClient(scoring=settings.scoring, tls=tls)
    except InvalidInputError as error:
        names = {"tls.ca_file": "scoring_ca_file"}
        raise InvalidInputError(
            *(FieldViolation(names.get(one.field, one.field), one.description) for one in error.violations)
        ) from error
    return ScoringRefiner(client, settings.scoring_scorer)
