"""Generate a WAV file of a prompt, with progress, by NVIDIA's tritonclient only.

    pip install 'tritonclient[grpc]'
    milonga serve generation --model mini                   # in another terminal
    python examples/tritonclient_generate.py "A dog barks then a siren wails" [--out clip.wav] [--seed 7]

Uses the Open Inference Protocol (docs/inference-protocol.md), with our services or with Triton's port 8001.
"""

import argparse
import queue
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

MODEL = "tango"


def tensor(name: str, datatype: str, values: Any) -> triton.InferInput:
    """Return an input tensor of one row."""
    made = triton.InferInput(name, [1], datatype)
    made.set_data_from_numpy(values)
    return made


def ask(client: triton.InferenceServerClient, prompt: str, seed: int, steps: int) -> Any:
    """Return the answer with the clip, and print the progress until then."""
    inputs = [
        tensor("PROMPT", "BYTES", np.array([prompt.encode()], dtype=np.object_)),
        tensor("SEED", "INT64", np.array([seed], dtype=np.int64)),
        tensor("NUM_INFERENCE_STEPS", "INT32", np.array([steps], dtype=np.int32)),
    ]
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    under_way = True
    try:
        client.async_stream_infer(MODEL, inputs)
        while True:
            result, error = answers.get()
            under_way = error is None and result.as_numpy("AUDIO") is None
            if error is not None:
                raise error
            if not under_way:
                return result
            print(f"\r{result.as_numpy('PROGRESS')[0]:4.0%}", end="", file=sys.stderr, flush=True)
    finally:
        print(file=sys.stderr)
        client.stop_stream(cancel_requests=under_way)  # Ctrl-C: cancels the request


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Generate a clip by a generation service, with tritonclient."
    )
    parser.add_argument("prompt", nargs="?", default="A dog barks then a siren wails")
    parser.add_argument("--url", default="localhost:50051", help="address of the service (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("clip.wav"), help="file to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same clip (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (%(default)s)")
    options = parser.parse_args()
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed is {options.seed}, must be between 0 and {2**63 - 1}")
    if not options.out.parent.is_dir():
        parser.error(f"--out is {options.out}, and {options.out.parent} is no folder")
    with triton.InferenceServerClient(options.url) as client:
        try:
            if not client.is_model_ready(MODEL):
                print(f"error: {options.url} does not serve {MODEL}, or is stopping", file=sys.stderr)
                return 1
            result = ask(client, options.prompt, options.seed, options.steps)
        except triton.InferenceServerException as error:
            print(f"error: {error.message()}", file=sys.stderr)
            return 1
    (waveform_N,) = result.as_numpy("AUDIO")
    (rate,) = result.as_numpy("SAMPLE_RATE")
    with wave.open(str(options.out), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(int(rate))
        file.writeframes(np.rint(waveform_N * 32767).astype("<i2").tobytes())
    (digest,) = result.as_numpy("DIGEST")
    print(f"{options.out}  version {result.get_response().model_version}, {digest.decode()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
