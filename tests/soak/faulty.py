"""A service as a program, on its embedded models, with faults that callers ask for by their prompts.

    MILONGA_LISTEN=127.0.0.1:50051 MILONGA_MODEL=mini python -m tests.soak.faulty generation

Its settings are those of the service, in the environment. It stops when its standard input ends.
"""

import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from services.api.explanation import Explanation, ExplanationRequest, Report
from services.api.generation import GenerationRequest
from services.captioning import serve as captioning
from services.captioning.loading import LoadedCaptioner
from services.captioning.loading import load as load_captioning
from services.captioning.settings import CaptioningSettings
from services.captioning.settings import find_models as find_captioner
from services.catalogue import CAPTIONING, EXPLANATION, GENERATION, REWARD, SCORING
from services.cli.child import watch_parent
from services.engine import Engine
from services.engine.denoiser import Denoiser
from services.engine.states import ClipState, GroupKey
from services.explanation import serve as explanation
from services.explanation.settings import ExplanationSettings
from services.explanation.worker import ExplanationWorker
from services.generation import serve as generation
from services.generation.settings import GenerationSettings, model_uris
from services.generation.slot import EngineSlot, Served
from services.models.architectures import load_generator
from services.models.captioner.model import Candidate, Captioner
from services.models.clap.model import ClapModel
from services.models.explaining.explainer import DiffusionExplainer
from services.models.explaining.methods import Points, Tick
from services.models.latent import Conditioning
from services.models.reward.model import load_reward
from services.models.tango.pipeline import TangoPipeline
from services.reward import serve as reward
from services.reward.model import RewardScorer
from services.reward.settings import CLAP, RewardSettings
from services.reward.settings import find_models as find_reward
from services.runtime.serving import Service, main
from services.scoring import serve as scoring
from services.scoring.scorers import Scorer
from services.scoring.settings import ScoringSettings
from services.scoring.settings import find_models as find_scorers
from services.weights.loading import load_clap_model
from services.weights.uri import ResolvedModel, resolve
from tests.services.runtime.fault_prompts import BREAK, ERROR, FAULT_TOKENS, HANG, LARGE, NAN
from tests.services.runtime.faulty import Faulty


class FaultyTango(TangoPipeline):
    """A pipeline whose denoiser fails at every call once it is `broken`."""

    broken = False

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        seconds: Tensor | None = None,
        jumps: Tensor | None = None,
    ) -> Tensor:
        """Denoise, or raise."""
        _act({ERROR} if self.broken else set())
        return super().predict(latents, timesteps, conditioning, seconds, jumps)


class FaultyDenoiser(Denoiser):
    """An engine's denoiser that does what the prompts of its clips ask for."""

    def __call__(self, key: GroupKey, clips: Sequence[ClipState]) -> tuple[list[Tensor], int]:
        """Raise, hang, or denoise: to NaN for the prompt `NAN`."""
        prompts = [clip.state.request.prompt for clip in clips]
        if BREAK in prompts:
            assert isinstance(self._pipeline, FaultyTango)
            self._pipeline.broken = True
        _act(set(prompts))
        outputs, rows = super().__call__(key, clips)
        pairs = zip(prompts, outputs, strict=True)
        return [output * torch.nan if prompt == NAN else output for prompt, output in pairs], rows


class FaultyClap(ClapModel):
    """A CLAP model that does what the prompts ask for."""

    broken = False

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Raise, hang, or embed: NaN for the prompt `NAN`."""
        self.broken = self.broken or BREAK in prompts
        _act({*prompts, *([ERROR] if self.broken else [])})
        embeddings_BD = super().embed_text(prompts)
        nan_B1 = torch.tensor([[prompt == NAN] for prompt in prompts])
        return torch.where(nan_B1, torch.nan, embeddings_BD)


class FaultyCaptioner(Captioner):
    """A captioner that does what the maximum of tokens asks for."""

    broken = False

    def generate(
        self, audio_BAD: Tensor, beams: Sequence[int] | None = None, max_new_tokens: int | None = None
    ) -> list[list[Candidate]]:
        """Raise, hang, or write captions: with log probabilities of NaN for the fault `NAN`."""
        asked = {fault for fault, tokens in FAULT_TOKENS.items() if tokens == max_new_tokens}
        self.broken = self.broken or BREAK in asked
        _act(asked | ({ERROR} if self.broken else set()))
        found = super().generate(audio_BAD, beams, max_new_tokens)
        if NAN not in asked:
            return found
        return [[replace(one, log_probability=math.nan) for one in row] for row in found]


class FaultyExplainer(DiffusionExplainer):
    """An explainer that does what the prompt of its clip asks for."""

    broken = False

    def explain(self, request: ExplanationRequest, report: Report) -> Explanation:
        """Raise, hang, or explain."""
        prompt = request.generation.prompt
        self.broken = self.broken or prompt == BREAK
        _act({prompt} | ({ERROR} if self.broken else set()))
        return super().explain(request, report)

    def generate(
        self, request: GenerationRequest, text: Conditioning, tick: Tick = lambda: None
    ) -> tuple[Tensor, Points]:
        """Generate a clip: NaN for the prompt `NAN`."""
        clean_1X, points = super().generate(request, text, tick)
        return clean_1X * (torch.nan if request.prompt == NAN else 1.0), points


def _act(prompts: set[str]) -> None:
    if HANG in prompts:
        threading.Event().wait()
    if ERROR in prompts:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if LARGE in prompts:
        raise torch.OutOfMemoryError("CUDA out of memory")


def _load_engine(settings: GenerationSettings, model: ResolvedModel) -> Engine:
    pipeline: Any = load_generator(model.folder, device=settings.device, dtype=settings.dtype)
    pipeline.__class__ = FaultyTango
    engine = Engine(pipeline, settings, model.identity)
    engine._worker._denoiser.__class__ = FaultyDenoiser
    return engine


def _load_generation(settings: GenerationSettings) -> EngineSlot:
    model = resolve(model_uris(settings)[GENERATION.model])
    return EngineSlot(Served(_load_engine(settings, model), model.folder), partial(_load_engine, settings))


def _load_scoring(settings: ScoringSettings) -> dict[str, Scorer]:
    scorers: dict[str, Scorer] = {}
    for name, version in find_scorers(settings).items():
        model: Any = load_clap_model(version, settings.device)
        model.__class__ = FaultyClap
        scorers[name] = Scorer(model, version, settings)
    return scorers


def _load_reward(settings: RewardSettings) -> RewardScorer:
    found = find_reward(settings)
    version, clap = found[REWARD.model], found[CLAP]
    model: Any = load_reward(version.folder, load_clap_model(clap, settings.device), clap.digest)
    model.__class__ = Faulty
    model.broken = False
    return RewardScorer(model, version, clap, settings)


def _load_captioning(settings: CaptioningSettings) -> LoadedCaptioner:
    loaded = load_captioning(settings, find_captioner(settings))
    loaded.worker.model._captioner.__class__ = FaultyCaptioner
    return loaded


def _load_explanation(settings: ExplanationSettings) -> ExplanationWorker:
    worker = explanation.load(settings)
    explainer: Any = worker._explainer
    explainer.__class__ = FaultyExplainer
    return worker


SERVICES: Final[Mapping[str, Callable[[], Service[Any, Any]]]] = MappingProxyType(
    {
        GENERATION.name: lambda: replace(generation.SERVICE, load=_load_generation),
        SCORING.name: lambda: replace(scoring.SERVICE, load=_load_scoring),
        REWARD.name: lambda: replace(reward.SERVICE, load=_load_reward),
        CAPTIONING.name: lambda: replace(captioning.SERVICE, load=_load_captioning),
        EXPLANATION.name: lambda: replace(explanation.SERVICE, load=_load_explanation),
    }
)

if __name__ == "__main__":
    watch_parent()
    sys.exit(main(SERVICES[sys.argv[1]]()))
