"""Generate, score and describe clips of three prompts; write a page with players, report: `make demo`.

    python examples/demo.py [--out build/demo] [--model mini] [--steps 25] [--seed 7]

Starts the services as child processes, waits until each is SERVING, streams the progress of each prompt,
scores every clip for every prompt, describes it in a sentence, writes WAV files and one self-contained HTML
page, and stops the services.
"""

import argparse
import base64
import html
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services import client, web
from services.audio.spectrogram import spectrogram_png
from services.catalogue import CATALOGUE
from services.cli.options import embedded_words
from services.cli.outputs import Cell, make_folder, print_table
from services.cli.progress import stage_of
from services.errors import MilongaError
from services.files import write_atomically
from services.processes import ServicePlan, free_port, running
from services.web.studio.opinions import opinion, verdict

PROMPTS = (
    "A dog barks then a siren wails",
    "A bird sings while rain falls",
    "A bell tolls after someone knocks",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sound:
    """One prompt's clip."""

    prompt: str
    clip: client.Clip
    finished: client.Finished
    seconds: float
    """Wall-clock time of the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScores:
    """The scores of one clip for one prompt."""

    scores: tuple[float, ...]
    """CLAP score by each scorer."""
    reward: client.Reward


def plans(model: str) -> list[ServicePlan]:
    """Return the services, each on a free port; generation with `model`, the others with embedded weights."""
    arguments = {entry.name: embedded_words(entry) for entry in CATALOGUE.values()}
    arguments["generation"] = ("--model", model)
    return [
        ServicePlan(name=name, arguments=flags, address=f"127.0.0.1:{free_port()}")
        for name, flags in arguments.items()
    ]


def score_clips(
    audio: client.AudioClient, prompts: Sequence[str], clips: Sequence[client.Clip]
) -> tuple[list[str], list[list[PairScores]]]:
    """Score every clip for every prompt. Return the scorers' names, and a row of scores per clip."""
    pairs = [(prompt, clip) for clip in clips for prompt in prompts]
    scores, rewards = audio.score_audio(pairs), audio.compute_rewards(pairs)
    scored = [
        PairScores(scores=tuple(row), reward=reward)
        for row, reward in zip(scores.values.tolist(), rewards.rewards, strict=True)
    ]
    rows = [scored[i : i + len(prompts)] for i in range(0, len(scored), len(prompts))]
    return [scorer.name for scorer in scores.scorers], rows


def table_rows(prompts: Sequence[str], scored: Sequence[Sequence[PairScores]]) -> list[list[Cell]]:
    """Return a row per clip: its scores for its own prompt, and its best probability for another prompt."""
    rows: list[list[Cell]] = []
    for number, (prompt, row) in enumerate(zip(prompts, scored, strict=True)):
        own, others = row[number], [one for index, one in enumerate(row) if index != number]
        best = max(others, key=lambda one: one.reward.logit)
        rows.append([prompt, *own.scores, own.reward.logit, own.reward.probability, best.reward.probability])
    return rows


def report(
    prompts: Sequence[str], scored: Sequence[Sequence[PairScores]], captions: Sequence[str]
) -> list[str]:
    """Return lines on each clip, in words: whether the reward model likes it, and what the captioner says."""
    rewards = [row[number].reward for number, row in enumerate(scored)]
    liked = sum(verdict(reward) == "likes" for reward in rewards)
    lines = [f"The reward model likes {liked} of {len(rewards)} clips:"]
    for prompt, reward, caption in zip(prompts, rewards, captions, strict=True):
        lines += [f"  {prompt}", f"    {opinion(reward)}", f"    The captioner says: {caption}"]
        if verdict(reward) == "does not like":
            lines.append("    Try other seeds, or the best of several: milonga generate --candidates 4")
    return lines


def make_sound(
    audio: client.AudioClient, prompt: str, options: client.GenerationOptions, bar: Progress
) -> Sound:
    """Stream one prompt, and show the progress of each step."""
    task, start = bar.add_task(prompt, total=1.0, stage="waiting"), time.monotonic()
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
  <p>{scores_text}</p>
  <p>the captioner: {caption}</p>
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


def card(sound: Sound, file: str, scorers: Sequence[str], scored: PairScores, caption: str) -> str:
    """Return the part of the page that shows one clip."""
    scores = (f"{html.escape(name)} {score:.3f}" for name, score in zip(scorers, scored.scores, strict=True))
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
        caption=html.escape(caption),
        scores_text=f"CLAP score {' · '.join(scores)}. {opinion(scored.reward)}",
    )


def page(sounds: Sequence[Sound], cards: Sequence[str]) -> str:
    """Return the whole page, self-contained: players and spectrograms."""
    model = sounds[0].finished.model
    return PAGE.format(
        name=html.escape(model.name),
        version=html.escape(model.version),
        digest=html.escape(model.digest),
        cards="".join(cards),
    )


def run(out: Path, model: str, options: client.GenerationOptions) -> Path:
    """Run the whole demo. Return the path of the page."""
    console = Console(stderr=True)
    make_folder(out)
    names = ", ".join(CATALOGUE)
    console.print(f"starting {names}; the generator is {model} (logs: {out}/*.log)", highlight=False)
    start = time.monotonic()
    with running(plans(model), logs=out) as services:
        for service in services:
            service.wait_until_serving()
        targets = {service.plan.name: service.target for service in services}
        console.print(f"ready after {time.monotonic() - start:.1f} s", highlight=False)
        columns = (
            TextColumn("{task.description:<36}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[stage]}"),
        )
        with client.AudioClient(
            targets["generation"],
            scoring=targets["scoring"],
            reward=targets["reward"],
            captioning=targets["captioning"],
        ) as audio:
            with Progress(*columns, console=console) as bar:
                sounds = [make_sound(audio, prompt, options, bar) for prompt in PROMPTS]
            clips = [sound.clip for sound in sounds]
            scorers, scored = score_clips(audio, PROMPTS, clips)
            captions = [one.text for one in audio.caption_audio(clips).captions]
    cards = []
    for number, sound in enumerate(sounds):
        file = f"clip-{number + 1}.wav"
        write_atomically(out / file, sound.clip.audio)
        console.print(f"{out / file}  {sound.prompt}", highlight=False)
        cards.append(card(sound, file, scorers, scored[number][number], captions[number]))
    header = ["prompt", *scorers, "reward", "probability", "for another prompt"]
    print_table(header, table_rows(PROMPTS, scored))
    for line in report(PROMPTS, scored, captions):
        print(line)
    write_atomically(out / "index.html", page(sounds, cards).encode())
    return out / "index.html"


def main() -> int:
    """Parse the command line and run. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder of clips and page")
    parser.add_argument("--model", default="mini", help="model URI")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--seed", type=int, default=7, help="seed of the noise")
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
    print(f"studio: run {Path(sys.executable).with_name('milonga')} up, and open http://127.0.0.1:{web.PORT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
