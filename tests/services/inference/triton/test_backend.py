"""A model in a process of the Python backend. A stand-in for Triton's module has what it is asked for."""

import subprocess
import sys
from pathlib import Path

from tests.programs import environment
from tests.waiting import LIMIT

UTILITIES = "class InferenceResponse: pass\n"

PROGRAM = """
import asyncio, json
from pathlib import Path
from services.audio.decoding import ReadClip
from services.inference.triton.backend import LoadedModel, PythonModel
from services.reward.inference import RewardInference
from services.reward.servicer import RewardServicer
from services.reward.settings import RewardSettings
from services.runtime.settings import load_settings
from services.reward.model import RewardScorer
from tests.services.reward.serving import CLAP, MODEL, tone
from tests.services.runtime.fault_prompts import EXIT
from tests.services.runtime.faulty import faulty

settings = load_settings(RewardSettings, model="mini")
scorer = RewardScorer(faulty(), MODEL, CLAP, settings)

async def open_model(folder, parameters):
    model = RewardInference(RewardServicer(scorer, settings))
    return LoadedModel(model=model, close=scorer.close, watch=scorer.watch)

model = PythonModel(open_model)
model.initialize({"model_config": "{}", "model_repository": ".", "model_version": "1"})
pair = scorer.prepare(EXIT, ReadClip(waveform=tone(), sampling_rate=16_000))
try:
    model._run(scorer.score([pair]))
except Exception as error:
    print("failed:", error, flush=True)
model._thread.join()
"""


def test_a_model_that_works_no_longer_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "triton_python_backend_utils.py").write_text(UTILITIES)
    variables = environment()
    variables["PYTHONPATH"] = f"{tmp_path}:{variables['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=variables,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "failed: the service has failed: the model's thread has ended" in done.stdout
    assert '"level": "critical"' in done.stderr
