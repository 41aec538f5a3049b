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
    return LoadedModel(model=model, close=scorer.batcher.close, watch=scorer.batcher.watch)

model = PythonModel(open_model)
model.initialize({"model_config": "{}", "model_repository": ".", "model_version": "1"})
pair = (EXIT, scorer.prepare(ReadClip(waveform=tone(), sampling_rate=16_000)).clip)
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


ASKING = """
import asyncio, json
from services.inference.triton.backend import LoadedModel, PythonModel
from services.reward.inference import RewardInference
from services.reward.model import RewardScorer
from services.reward.servicer import RewardServicer
from services.reward.settings import RewardSettings
from services.runtime.settings import load_settings
from tests.services.reward.serving import CLAP, MODEL
from tests.tiny import tiny_clap, tiny_reward

settings = load_settings(RewardSettings, model="mini")
scorer = RewardScorer(tiny_reward(tiny_clap()), MODEL, CLAP, settings)

async def open_model(folder, parameters):
    model = RewardInference(RewardServicer(scorer, settings))
    return LoadedModel(model=model, close=scorer.batcher.close, watch=scorer.batcher.watch)

class Request:
    def __init__(self, parameters="", correlation=0):
        self._parameters, self._correlation = parameters, correlation
    def parameters(self): return self._parameters
    def correlation_id(self): return self._correlation
    def timeout(self): return 0
    def inputs(self): return []
    def request_id(self): return "mine"
    def requested_output_names(self): return ["REWARD"]

model = PythonModel(open_model)
model.initialize({"model_config": "{}", "model_repository": ".", "model_version": "1"})
requests = [Request(), Request("{}"), Request(json.dumps({"PROMPT": "a", "x": 1})), Request(correlation=7)]
for response in model.execute(requests):
    print(response.error.code, response.error.message)
model.finalize()
"""

ANSWERING = """
class TritonError:
    INVALID_ARG, NOT_FOUND, UNAVAILABLE, UNSUPPORTED, CANCELLED, INTERNAL = (
        "INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "UNSUPPORTED", "CANCELLED", "INTERNAL"
    )
    def __init__(self, message, code): self.message, self.code = message, code

class InferenceResponse:
    def __init__(self, tensors=(), error=None): self.tensors, self.error = tensors, error
"""


def test_parameters_that_are_not_honoured_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "triton_python_backend_utils.py").write_text(ANSWERING)
    variables = environment()
    variables["PYTHONPATH"] = f"{tmp_path}:{variables['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-c", ASKING],
        env=variables,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    none, empty, unknown, sequence = done.stdout.splitlines()
    for line in (none, empty):
        assert line.startswith("INVALID_ARG prompt: tensor PROMPT is missing")
    assert unknown.startswith(
        "INVALID_ARG parameters.PROMPT: is 'a', but this option is a tensor; send PROMPT,"
    )
    assert "parameters.x: is unknown; known parameters" in unknown
    assert sequence.startswith("INVALID_ARG parameters.sequence_id: is '7', but requests are independent")
