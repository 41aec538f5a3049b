"""The code of a registered model, which MLflow keeps next to the weights instead of a pickle.

    model = mlflow.pyfunc.load_model("models:/milonga-tango@challenger")
    [clip] = model.predict({"prompt": "A dog barks then a siren wails", "seed": 7})
    clip["audio"]            # float32 [N] in [-1, 1]
    clip["sampling_rate"]    # hertz
    clip["seed"]             # as given, or drawn

    clips = model.predict(["A dog barks", "A bell tolls"], params={"seed": 7, "duration": 5.0})

    [verdict] = mlflow.pyfunc.load_model("models:/milonga-reward@challenger").predict(
        {"prompt": "A dog barks", "audio": waveform, "sampling_rate": 16_000}
    )
    verdict["logit"], verdict["probability"]

    [row] = mlflow.pyfunc.load_model("models:/milonga-captioner@challenger").predict(
        {"audio": waveform, "sampling_rate": 16_000}
    )
    row["caption"]           # of the largest number of beams, without CLAP-Refine

`predict` takes one row (a dict) or many (a list of dicts, a DataFrame) and returns a list of dicts, one for
each. A row of `milonga-tango` may be a prompt alone (a string), or have `negative_prompt`, `seed`,
`num_inference_steps`, `guidance_scale` and `duration` (seconds). Missing values are taken from `params`, then
from the model's defaults. A seed gives the same clip as the service.

It needs ``milonga[serving]`` only; nothing of `training` is imported.
"""

import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray

from services.environment import quiet_libraries

quiet_libraries()

from services.audio.prompt import MAX_PROMPT_CHARACTERS, prompt_fault  # noqa: E402
from services.engine import Engine  # noqa: E402
from services.errors import invalid, shown_value  # noqa: E402
from services.models.architectures import load_generator  # noqa: E402
from services.models.captioner.config import CLASS_NAME  # noqa: E402
from services.models.captioner.model import Captioner  # noqa: E402
from services.models.clap.laion import load_laion  # noqa: E402
from services.models.clap.loading import load_clap  # noqa: E402
from services.models.reward.model import MODEL_TYPE, RewardModel, load_reward, read_reward_config  # noqa: E402
from services.weights.uri import resolve  # noqa: E402

SEEDS = 2**63
"""Seeds are below this."""


class MilongaModel(PythonModel):
    """A text-to-audio model, a reward model or a captioner, by its folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the artifact `model`, and the artifact `clap` of a reward model."""
        folder = Path(context.artifacts["model"])
        config = folder / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        self.model: Engine | RewardModel | Captioner
        if settings.get("_class_name") == CLASS_NAME:
            self.model = Captioner.from_pretrained(folder, "auto")
        elif settings.get("model_type") == MODEL_TYPE:
            path = Path(context.artifacts["clap"])
            clap = load_laion(path, device="auto") if path.is_file() else load_clap(path, device="auto")
            # The registration checked that this is its CLAP model.
            self.model = load_reward(folder, clap, read_reward_config(folder).clap_digest)
        else:
            # An adapter is merged into the model that it was trained from.
            self.model = Engine(load_generator(resolve(f"file:{folder}").folder, device="auto"))

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Return a clip, a reward or a caption for each row. Raises `InvalidInputError`."""
        if model_input.columns.empty:
            raise invalid("prompt", "is missing; give a string, a list of strings, or rows with `prompt`")
        rows = [completed(row, params or {}) for row in model_input.to_dict("records")]
        return [self._answer(row) for row in rows]

    def _answer(self, row: Mapping[str, Any]) -> dict[str, Any]:
        match self.model:
            case RewardModel():
                return rewarded(self.model, row)
            case Captioner():
                return captioned(self.model, row)
            case _:
                return generated(self.model, row)


def completed(row: Mapping[Any, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return `row` with `params` for what it has no value for.

    MLflow makes column 0 of strings without a name: those are prompts.
    """
    own = {"prompt" if name == 0 else str(name): row[name] for name in row if given(row, name)}
    return {name: value for name, value in params.items() if value is not None} | own


def generated(engine: Engine, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the clip of one row."""
    seed = whole(row, "seed")
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    if not 0 <= seed < SEEDS:
        raise invalid("seed", f"is {seed}, must lie in [0, 2^63)")
    request = engine.request(
        sentence(row),
        negative_prompt=row["negative_prompt"] if given(row, "negative_prompt") else None,
        duration=number(row, "duration"),
        seed=seed,
        num_inference_steps=whole(row, "num_inference_steps"),
        guidance_scale=number(row, "guidance_scale"),
    )
    (clip,) = engine.generate(request).clips
    return {"audio": clip.waveform(), "sampling_rate": clip.sampling_rate, "seed": seed}


def rewarded(model: RewardModel, row: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the reward of one row."""
    prompt = sentence(row)
    if not model.reads(prompt):
        raise invalid("prompt", "has no word for a sound that the reward model knows; use other words")
    logit = model.reward([prompt], [model.prepare(*sound(row))]).item()
    return {"logit": logit, "probability": 1 / (1 + math.exp(-logit))}


def captioned(model: Captioner, row: Mapping[str, Any]) -> dict[str, Any]:
    """Caption the clip of one row."""
    ((candidate,),) = model.generate(model.encode([model.prepare(*sound(row))]), [max(model.config.beams)])
    return {"caption": candidate.text}


def sound(row: Mapping[str, Any]) -> tuple[NDArray[np.float32], int]:
    """Return the samples of a row and their rate in hertz."""
    rate, waveform_N = whole(row, "sampling_rate"), np.asarray(row["audio"], dtype=np.float32)
    if waveform_N.ndim != 1 or not len(waveform_N) or not np.isfinite(waveform_N).all():
        raise invalid("audio", f"has the shape {waveform_N.shape}, must be finite mono samples")
    if rate is None or rate < 1:
        raise invalid("sampling_rate", f"is {rate}, must be a number of hertz")
    return waveform_N, rate


def sentence(row: Mapping[str, Any]) -> str:
    """Return the prompt of a row."""
    prompt = row.get("prompt")
    fault = (
        prompt_fault(prompt, MAX_PROMPT_CHARACTERS) if isinstance(prompt, str) else "is missing or no text"
    )
    if fault:
        raise invalid("prompt", fault)
    return str(prompt)


def given(row: Mapping[Any, Any], name: Any) -> bool:
    """Return whether a row has a value for `name`: in a table, missing values are NaN."""
    value = row.get(name)
    return not (pd.api.types.is_scalar(value) and pd.isna(value))


def number(row: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a row, None if it has none."""
    if not given(row, name):
        return None
    try:
        return float(row[name])
    except (TypeError, ValueError):
        raise invalid(name, f"is {shown_value(row[name])}, must be a number") from None


def whole(row: Mapping[str, Any], name: str) -> int | None:
    """Return a whole number of a row, None if it has none."""
    value = number(row, name)
    if value is None:
        return None
    if not value.is_integer():
        raise invalid(name, f"is {shown_value(row[name])}, must be a whole number")
    exact = isinstance(row[name], int | np.integer)  # a float holds no more than 53 bits of a seed
    return int(row[name] if exact else value)


set_model(MilongaModel())
