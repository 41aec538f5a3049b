"""`ClipExplainer` in this process, with the service's defaults and limits. Needs torch."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Unpack

from services.api.explanation import (
    Explainer,
    ExplainerModel,
    Explanation,
    ExplanationOptions,
    ExplanationUpdate,
    as_requested,
)
from services.api.model import ModelVersion
from services.audio.clips import read_clip
from services.audio.decoding import AudioBounds, ReadClip
from services.client.explanation import explanation_request
from services.errors import InvalidInputError
from services.weights.explainers import load_explainer
from services.weights.uri import ResolvedModel
from services.wire.explanation import read_explanation_request


class LocalExplainer:
    """A `ClipExplainer` with a model in this process. Thread-safe: calls run one at a time."""

    def __init__(self, explainer: Explainer, version: ModelVersion) -> None:
        self._explainer, self._version = explainer, version
        self._lock = threading.Lock()
        description = explainer.description
        self.description: ExplainerModel = replace(
            description, generation=replace(description.generation, model=version)
        )

    def explain_audio(
        self,
        prompt: str,
        *,
        on_update: Callable[[ExplanationUpdate], None] | None = None,
        **options: Unpack[ExplanationOptions],
    ) -> Explanation:
        """See `ClipExplainer`."""
        # Through the wire's message, so that it accepts and refuses what the service does.
        message = explanation_request(prompt, **options)
        given: ReadClip | None = None
        if message.HasField("clip"):
            given = read_clip(message.clip, "clip", AudioBounds(max_batch_size=1))
        request, faults = read_explanation_request(message, self.description, given)
        if faults:
            raise InvalidInputError(
                *(replace(fault, field=fault.field.removeprefix("request.")) for fault in faults)
            )
        report: Any = on_update or (lambda _: None)
        with self._lock:
            found = self._explainer.explain(request, report)
        return as_requested(replace(found, model=self._version), request)

    def close(self) -> None:
        """See `ClipExplainer`."""


def open_explainer(model: ResolvedModel, *, device: str = "auto", dtype: str = "float32") -> LocalExplainer:
    """Load a generator and its explainer; takes seconds.

    Raises:
        ModelError: the model was refused.
        InvalidInputError: the device does not exist.
    """
    return LocalExplainer(load_explainer(model, device=device, dtype=dtype), model.identity)
