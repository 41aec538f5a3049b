"""From three prompts to a page you can listen to, over gRPC. Run by `make demo`.

    python examples/demo.py [--out build/demo] [--model mini] [--steps 25] [--seed 7]

Starts `milonga serve generation` as a process of its own, waits until its health service says SERVING,
streams each prompt's progress, writes WAV files and one self-contained HTML page, and stops the service.
"""

import argparse
import base64
import contextlib
import html
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services import client
from services.cli.outputs import make_folder, write_atomically
from services.cli.progress import stage_of
from services.errors import MilongaError, ServiceUnavailableError
from services.spectrogram import spectrogram_png

PROMPTS = (
    "A dog barks then a siren wails",
    "A bird sings while rain falls",
    "A bell tolls after someone knocks",
)
START_SECONDS = 180.0
STOP_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """One prompt's clip."""

    prompt: str
    clip: client.Clip
    finished: client.Finished
    seconds: float
    """Wall clock from asking to having it."""


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_serving(server: subprocess.Popen[bytes], target: str, log: Path) -> None:
    """Return when the health service says SERVING.

    Raises:
        ServiceUnavailableError: the server ended, or is not ready in time; with the end of its log.
    """
    deadline = time.monotonic() + START_SECONDS
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(grpc.RpcError):
                request = health_pb2.HealthCheckRequest()
                answer = stub.Check(request, timeout=2.0)  # type: ignore[attr-defined]
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(0.1)
    tail = " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
    raise ServiceUnavailableError(f"the service did not come up ({log}): {tail}")


@contextlib.contextmanager
def running_service(model: str, log: Path) -> Iterator[str]:
    """Run `milonga serve generation` for the time of the context. Yields its address."""
    target = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "services.cli", "serve", "generation", "--model", model]
    with log.open("wb") as out:
        server = subprocess.Popen([*command, "--listen", target], stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_serving(server, target, log)
        yield target
    finally:
        # As Kubernetes would: SIGTERM, time to drain, and only then by force.
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def make_sound(
    audio: client.AudioClient, prompt: str, options: client.GenerationOptions, bar: Progress
) -> Sound:
    """Stream one prompt, showing each step."""
    task, start = bar.add_task(prompt, total=1.0, stage="asking"), time.monotonic()
    clip: client.Clip | None = None
    for update in audio.stream(prompt, **options):
        bar.update(task, stage=stage_of(update) or "done")
        match update:
            case client.Progress(fraction=fraction):
                bar.update(task, completed=0.95 * fraction)
            case client.Clip():
                clip = update
            case client.Finished() if clip is not None:
                bar.update(task, completed=1.0, stage="done")
                return Sound(prompt=prompt, clip=clip, finished=update, seconds=time.monotonic() - start)
    raise MilongaError("the stream ended without its clip")


def data_uri(kind: str, content: bytes) -> str:
    """Return `content` as a URI, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


CARD = """
<article>
  <h2>{prompt}</h2>
  <img alt="Spectrogram of the clip: {prompt}" src="{picture}">
  <audio controls preload="metadata" src="{sound}"></audio>
  <p>seed {seed} · {duration:.2f} s of sound in {seconds:.2f} s · denoising {denoise:.2f} s,
     decoding {decode:.2f} s · <a download="{file}" href="{sound}">{file}</a>{warnings}</p>
</article>"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Milonga: three prompts, three clips</title>
<style>
  :root {{ color-scheme: light; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem;
         color: #26262c; background: #f6f5f3; }}
  article {{ background: #fff; border-radius: .6rem; padding: 1rem 1.2rem; margin: 1.2rem 0;
            box-shadow: 0 1px 3px #0002; }}
  h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin: 0 0 .5rem; }}
  img, audio {{ display: block; width: 100%; }}
  p {{ color: #5a5a64; font-size: .9rem; margin: .5rem 0 0; overflow-wrap: anywhere; }}
  .warning {{ color: #a4420a; }}
</style>
<h1>Three prompts, three clips</h1>
<p>Made by the model <b>{name}</b> {version} ({digest}), served over gRPC on this machine.
   The same prompt and seed give the same clip again.</p>
{cards}
</html>
"""


def card(sound: Sound, file: str) -> str:
    """Return the part of the page that shows one clip."""
    warnings = "".join(
        f'<br><span class="warning">{html.escape(warning)}</span>' for warning in sound.finished.warnings
    )
    picture = spectrogram_png(sound.clip.waveform(), sound.clip.sampling_rate)
    return CARD.format(
        prompt=html.escape(sound.prompt),
        picture=data_uri("image/png", picture),
        sound=data_uri("audio/wav", sound.clip.audio),
        seed=sound.clip.seed,
        duration=sound.clip.duration,
        seconds=sound.seconds,
        denoise=sound.finished.timings.denoise,
        decode=sound.finished.timings.decode,
        file=file,
        warnings=warnings,
    )


def page(sounds: list[Sound], files: list[str]) -> str:
    """Return the whole page: players and spectrograms, nothing outside it."""
    model = sounds[0].finished.model
    return PAGE.format(
        name=html.escape(model.name),
        version=html.escape(model.version),
        digest=html.escape(model.digest),
        cards="".join(card(sound, file) for sound, file in zip(sounds, files, strict=True)),
    )


def run(out: Path, model: str, options: client.GenerationOptions) -> Path:
    """Run the whole demo. Returns the page's path."""
    console = Console(stderr=True)
    make_folder(out)
    log = out / "server.log"
    console.print(f"starting the generation service with {model} (log: {log})", highlight=False)
    start = time.monotonic()
    with running_service(model, log) as target, client.AudioClient(target) as audio:
        console.print(f"ready on {target} after {time.monotonic() - start:.1f} s", highlight=False)
        columns = (
            TextColumn("{task.description:<36}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[stage]}"),
        )
        with Progress(*columns, console=console) as bar:
            sounds = [make_sound(audio, prompt, options, bar) for prompt in PROMPTS]
    files = [f"clip-{number}.wav" for number in range(1, len(sounds) + 1)]
    for sound, file in zip(sounds, files, strict=True):
        write_atomically(out / file, sound.clip.audio)
        console.print(f"{out / file}  {sound.prompt}", highlight=False)
    write_atomically(out / "index.html", page(sounds, files).encode())
    return out / "index.html"


def main() -> int:
    """Parse the command line and run. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder of clips and page")
    parser.add_argument("--model", default="mini", help="model URI")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--seed", type=int, default=7, help="where the noise starts")
    arguments = parser.parse_args()
    options: client.GenerationOptions = {"seed": arguments.seed, "num_inference_steps": arguments.steps}
    try:
        written = run(arguments.out, arguments.model, options)
    except KeyboardInterrupt:
        return 130
    except MilongaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"listen: {written.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
