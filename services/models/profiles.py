"""The profiles of a model folder: named settings of its denoising, in `model_index.json`.

"profiles": {"draft": {"num_inference_steps": 4, "guidance_scale": 3.0, "scheduler": "dpmsolver++"}}
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any, Final

from services.api.generation import GenerationModel, Profile
from services.errors import ModelFormatError

_MAX_NAME: Final = 40
_REQUIRED: Final = frozenset(("num_inference_steps", "guidance_scale", "scheduler"))
_OPTIONAL: Final = frozenset(Profile.__slots__) - {"name"} - _REQUIRED


def with_profiles(model: GenerationModel, profiles: Mapping[str, Any] | None) -> GenerationModel:
    """Return `model` with the `profiles` of its folder's config, the one of most steps first.

    Raises `ModelFormatError`.
    """
    read = [_read(name, settings, model) for name, settings in (profiles or {}).items()]
    found = tuple(sorted(read, key=lambda one: -one.num_inference_steps))
    return replace(
        model,
        limits=replace(model.limits, profiles=tuple(one.name for one in found)),
        defaults=replace(model.defaults, profiles=found),
    )


def _read(name: str, settings: Any, model: GenerationModel) -> Profile:
    limits, place = model.limits, f"model_index.json: profiles.{name[:_MAX_NAME]}"
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise ModelFormatError(f"{place}: a name has 1 to {_MAX_NAME} printable characters")
    if not isinstance(settings, Mapping) or not _REQUIRED <= settings.keys() <= _REQUIRED | _OPTIONAL:
        names, more = (", ".join(sorted(some)) for some in (_REQUIRED, _OPTIONAL))
        raise ModelFormatError(f"{place} must have {names}, may have {more}, and nothing else")
    steps, scheduler = settings["num_inference_steps"], settings["scheduler"]
    scale, stop = settings["guidance_scale"], settings.get("guidance_stop", 1.0)
    checks = (
        (type(steps) is int and 1 <= steps <= limits.max_steps, f"steps are not 1 to {limits.max_steps}"),
        (
            _is_number(scale, limits.max_guidance_scale),
            f"guidance scale is not 0 to {limits.max_guidance_scale:g}",
        ),
        (_is_number(stop, 1.0), "guidance_stop is not 0 to 1"),
        (scheduler in limits.schedulers, f"scheduler is not one of {', '.join(limits.schedulers)}"),
    )
    for valid, fault in checks:
        if not valid:
            raise ModelFormatError(f"{place}: its {fault}")
    return Profile(
        name=name,
        num_inference_steps=steps,
        guidance_scale=float(scale),
        scheduler=str(scheduler),
        guidance_stop=float(stop),
    )


def _is_number(value: Any, most: float) -> bool:
    return type(value) in (int, float) and isfinite(value) and 0 <= value <= most
