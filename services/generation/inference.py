"""The generation service as a model of the Open Inference Protocol: tensors in, tensors out.

Row i is the clip that GenerateAudio makes of prompt i with seed i, bit for bit.
Imports no torch. Shapes: n prompts, N samples.
"""

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from services.api.generation import (
    Clip,
    Finished,
    GenerationOptions,
    GenerationRequest,
    Progress,
    Queued,
    violations,
)
from services.catalogue import GENERATION
from services.errors import FieldViolation, InvalidInputError
from services.generation.operator import Switcher
from services.generation.servicer import run
from services.inference import Response, Stages, Tensors, TensorSpec, spread, texts
from services.inference.model import Caller, Parameter
from services.inference.tensors import decimals, row_field

if TYPE_CHECKING:
    from services.generation.slot import EngineSlot, Served


PROMPT: Final = TensorSpec(name="PROMPT", field="prompt", datatype="BYTES", dims=("n",))


def _option(field: str, datatype: str) -> TensorSpec:
    return TensorSpec(
        name=field.upper(), field=field, datatype=datatype, dims=("n",), optional=True, one_for_all=True
    )


DURATION: Final = _option("duration", "FP32")
OPTIONS: Final = (
    _option("negative_prompt", "BYTES"),
    _option("seed", "INT64"),
    _option("num_inference_steps", "INT32"),
    _option("guidance_scale", "FP32"),
    _option("guidance_stop", "FP32"),
    DURATION,
    _option("scheduler", "BYTES"),
    _option("profile", "BYTES"),
    _option("loudness", "FP32"),
    _option("adapter", "BYTES"),
)
"""Keyword arguments of a generation, each with one value per row, or one for all rows."""
INPUTS: Final = (PROMPT, *OPTIONS)

OUTPUTS: Final = (
    TensorSpec(name="AUDIO", field="audio", datatype="FP32", dims=("n", "samples")),
    TensorSpec(name="SAMPLE_RATE", field="sample_rate_hertz", datatype="INT32", dims=(1,)),
    TensorSpec(name="SEED", field="seed", datatype="INT64", dims=("n",)),
    TensorSpec(name="DIGEST", field="digest", datatype="BYTES", dims=("n",)),
    TensorSpec(name="ROW", field="row", datatype="INT32", dims=(1,), optional=True),
    TensorSpec(name="PROGRESS", field="progress", datatype="FP32", dims=(1,), optional=True),
)
"""Each response of a stream is of one row, ROW: with PROGRESS, or with the other tensors and the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt's clip."""

    waveform_N: NDArray[np.float32]
    """Samples."""
    seed: int
    """Seed of the noise, given or drawn."""
    finished: Finished
    """The last event of the request."""


class GenerationInference:
    """The models of a slot as a model of the Open Inference Protocol."""

    name, inputs, outputs, decoupled = GENERATION.model, INPUTS, OUTPUTS, True

    def __init__(self, slot: "EngineSlot") -> None:
        self._slot = slot

    @property
    def max_rows(self) -> int:
        """Largest number of prompts in a request: the native API's largest number of clips."""
        return self._slot.current.engine.limits.max_clip_count

    @property
    def limits(self) -> Mapping[str, str]:
        """Limits of a request, as metadata; durations are in seconds."""
        limits = self._slot.current.engine.limits
        lists = {"adapters": limits.adapters, "profiles": limits.profiles}
        return {
            "min_duration": f"{limits.min_duration:g}",
            "max_duration": f"{limits.max_duration:g}",
            "max_num_inference_steps": str(limits.max_steps),
            "schedulers": ",".join(limits.schedulers),
            **{name: ",".join(values) for name, values in lists.items() if values},
        }

    @contextmanager
    def lease(self) -> Iterator["GenerationLease"]:
        """Hold the served weights for one call."""
        with self._slot.lease() as served:
            yield GenerationLease(served)


class GenerationLease:
    """The weights that one call uses."""

    def __init__(self, served: "Served") -> None:
        self._served = served
        self.version = served.version.version
        self.parameters = {
            "name": served.version.name,
            "version": served.version.version,
            "digest": served.version.digest,
        }

    def read(self, tensors: Tensors) -> list[GenerationRequest]:
        """Return a request for each prompt."""
        prompts, faults = texts(tensors, PROMPT)
        assert prompts is not None
        n = len(prompts)
        columns: dict[str, list[Any]] = {}
        for spec in OPTIONS:
            values: Any = tensors.get(spec.name)
            if spec.datatype == "BYTES":
                values, wrong = texts(tensors, spec)
                faults += wrong
            elif spec.datatype == "FP32":
                values = decimals(values)
            columns[spec.field] = spread(values, n)
        # An empty text is an option that is left out.
        rows = [
            {name: column[row] for name, column in columns.items() if column[row] != ""} for row in range(n)
        ]
        requests = [
            self._served.engine.request(prompt, **cast(GenerationOptions, {**row, "encoding": "float32"}))
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        # A value that is not text is reported once, as such.
        reported = {fault.field for fault in faults}
        found = [fault for fault in self._violations(requests) if fault.field not in reported]
        if faults or found:
            raise InvalidInputError(*faults, *found)
        return requests

    def _violations(self, requests: Sequence[GenerationRequest]) -> Iterator[FieldViolation]:
        """Yield the violations of each request, and of durations that do not fit into one tensor."""
        n = len(requests)
        for index, request in enumerate(requests):
            for fault in violations(request, self._served.engine.limits):
                yield replace(fault, field=row_field(fault.field, index, n))
        durations = sorted({request.duration for request in requests})
        if len(durations) > 1:
            yield FieldViolation(
                DURATION.field,
                f"tensor DURATION has the values {', '.join(map(str, durations))}, expected one for all rows "
                "of AUDIO; send them in several requests",
            )

    async def run(
        self, job: Sequence[GenerationRequest], caller: Caller, *, stream: bool
    ) -> AsyncGenerator[Response, None]:
        """Yield progress and each clip as it is done; without `stream`, all clips at once."""
        rate = self._served.engine.description.geometry.sampling_rate
        clips: dict[int, Clip] = {}
        rows: dict[int, Row] = {}
        async with aclosing(run(self._served.engine, job, caller.time_remaining())) as events:
            async for index, event in events:
                match event:
                    case Queued() | Progress() if stream:
                        yield _progress(index, event)
                    case Clip():
                        clips[index] = event.as_requested(job[index])
                    case Finished():
                        clip = clips[index]
                        rows[index] = Row(waveform_N=clip.waveform(), seed=clip.seed, finished=event)
                        if stream:
                            final = len(rows) == len(job)
                            yield self._audio(
                                [rows[index]], rate, _stages(rows) if final else None, row=index
                            )
        if not stream:
            yield self._audio([rows[index] for index in range(len(job))], rate, _stages(rows))

    def _audio(
        self, rows: Sequence[Row], rate: int, stages: Stages | None, *, row: int | None = None
    ) -> Response:
        """Return a response with the clips of `rows`.

        The last response has `stages`; each response of a stream has its one `row`.
        """
        outputs: dict[str, NDArray[Any]] = {
            "AUDIO": np.stack([one.waveform_N for one in rows]),
            "SAMPLE_RATE": np.array([rate], dtype=np.int32),
            "SEED": np.array([one.seed for one in rows], dtype=np.int64),
            "DIGEST": np.array([self._served.version.digest.encode()] * len(rows), dtype=object),
        }
        if row is not None:
            outputs["ROW"] = np.array([row], dtype=np.int32)
        warnings = dict.fromkeys(warning for one in rows for warning in one.finished.warnings)
        adapters = dict.fromkeys(one.finished.adapter.digest for one in rows if one.finished.adapter)
        found = {"warnings": warnings, "adapter_digests": adapters}
        return Response(
            outputs=outputs,
            parameters={name: "\n".join(texts) for name, texts in found.items() if texts},
            rows=len(rows),
            stages=stages,
            final=stages is not None,
        )


class SlotOperator:
    """Switches the model of a slot, for `RepositoryModelLoad`. The interceptor admits only operators."""

    def __init__(self, switcher: Switcher) -> None:
        self._switcher = switcher

    async def load(self, uri: str) -> None:
        """Switch to the model of `uri`."""
        await self._switcher.switch(uri)


def _progress(row: int, event: Queued | Progress) -> Response:
    parameters: dict[str, Parameter] = {}
    if isinstance(event, Queued):
        parameters["queue_position"] = event.position
        fraction = 0.0
    else:
        parameters |= {"step": event.step, "num_inference_steps": event.num_inference_steps}
        if event.seconds_left is not None:
            parameters["seconds_left"] = event.seconds_left
        fraction = event.fraction
    outputs = {"PROGRESS": np.array([fraction], dtype=np.float32), "ROW": np.array([row], dtype=np.int32)}
    return Response(outputs=outputs, parameters=parameters)


def _stages(rows: Mapping[int, Row]) -> Stages:
    """Return the longest time of each stage: rows run concurrently."""
    timings = [row.finished.timings for row in rows.values()]
    return Stages(
        queue=max(one.queued for one in timings),
        compute_input=max(one.encode for one in timings),
        compute_infer=max(one.denoise for one in timings),
        compute_output=max(one.decode for one in timings),
    )
