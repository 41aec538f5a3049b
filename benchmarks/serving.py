"""What the generation service costs on this machine: time to ready, memory, a call against the engine alone.

    python -m benchmarks.serving [--model mini] [--calls 12] [--output FILE]

Time to ready runs from the start of the process to SERVING from its health service. Calls over gRPC and calls
of an engine in this process take turns.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.measuring import PROMPT, memory_mib, seconds, service_plan, write_report
from services.client import AudioClient
from services.engine import Engine, EngineConfig
from services.models.architectures import load_generator
from services.models.mini import mini_folder
from services.processes import running


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--calls", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("build/bench/serving.json"))
    arguments = parser.parse_args()
    plans = [service_plan("generation", "--model", arguments.model)]
    with TemporaryDirectory() as folder, running(plans, logs=Path(folder)) as (service,):
        service.wait_until_serving()
        ready = service.ready_seconds
        idle = memory_mib(service.process.pid)
        config = EngineConfig(threads=torch.get_num_threads())
        engine = Engine(load_generator(mini_folder(arguments.model)), config)
        with AudioClient(service.target) as client, engine:
            request = engine.request(PROMPT, seed=0)
            client.generate(PROMPT, seed=0)
            engine.generate(request)
            pairs = [
                (
                    seconds(lambda: client.generate(PROMPT, seed=0)),
                    seconds(lambda: engine.generate(request)),
                )
                for _ in range(arguments.calls)
            ]
        loaded = memory_mib(service.process.pid)
    report = {
        "model": arguments.model,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "start_to_ready_seconds": ready,
        "resident_mib_when_ready": idle["VmRSS"],
        "peak_mib_after_calls": loaded["VmHWM"],
        "call_seconds": median(pair[0] for pair in pairs),
        "engine_seconds": median(pair[1] for pair in pairs),
        "call_over_engine": median(pair[0] / pair[1] for pair in pairs),
    }
    write_report(arguments.output, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
