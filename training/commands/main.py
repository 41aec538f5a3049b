"""The commands that training adds to `milonga` (entry-point group `milonga.commands`)."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from services.errors import OutputError, invalid
from training.commands import adapt as adapt_command
from training.commands import captioning as captioning_commands
from training.commands import evaluate as evaluate_command
from training.commands import explanations as explanation_commands
from training.commands import finetune as finetune_commands
from training.commands import listen as listen_command
from training.commands import new as new_command
from training.commands import run as run_command
from training.commands import submit as submit_command
from training.commands import tracking as tracking_cli
from training.commands.options import Resume, Settings, Show, add_ratings, is_first_process, take_ratings
from training.commands.preferences import preferences as preferences_command

soundworld = typer.Typer(
    help="The procedural sounds that the mini family learned from.", no_args_is_help=True
)


@soundworld.callback()
def _soundworld() -> None:
    pass


@soundworld.command()
def sample(
    folder: Annotated[
        Path, typer.Argument(help="Folder for WAV files and soundworld.jsonl; made if missing.")
    ],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of clips.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same clips.")] = 0,
    duration: Annotated[float, typer.Option(help="Seconds a clip: 2.56 or 5.12.")] = 2.56,
    three: Annotated[
        float, typer.Option(min=0, max=1, help="Share of sequences with three events (5.12 s).")
    ] = 0.0,
    split: Annotated[str, typer.Option(help="train, validation or test: divided by caption.")] = "train",
) -> None:
    """Write clips with captions and ground truth, in the format of Tango's AudioCaps lists."""
    from typing import cast, get_args

    from training.soundworld.export import INDEX, export_scenes
    from training.soundworld.scenes import SceneConfig, Split

    if split not in get_args(Split):
        raise invalid("--split", f"{split!r}; give one of {', '.join(get_args(Split))}")
    try:
        config = SceneConfig(duration=duration, three=three, split=cast(Split, split))
    except ValueError as error:
        raise invalid("--duration", str(error)) from error
    try:
        scenes = export_scenes(folder, count=count, seed=seed, config=config)
        for _ in track(scenes, total=count, description="clips", disable=not _interactive()):
            pass
    except OSError as error:
        raise OutputError(f"{folder} can't be written: {error.strerror}; write elsewhere") from error
    typer.echo(f"{count} clips: {folder / INDEX}")


train = typer.Typer(
    help="Train models. A run that was stopped resumes: give the same command again.",
    no_args_is_help=True,
)


@train.callback()
def _train() -> None:
    pass


@train.command()
def reward(
    recipe: Annotated[str, typer.Option("--recipe", help="mini, smoke or baton.")] = "mini",
    settings: Settings = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the model.", show_default="build/reward/NAME"),
    ] = None,
    resume: Resume = True,
    show: Show = False,
) -> None:
    """Train a reward model on a frozen CLAP model, from labels, from pairs, or from both."""
    from training.loop.config import describe, override
    from training.runs import recipes

    given, ratings = take_ratings(settings or [])
    config = override(recipes.recipe(recipes.REWARD, recipe), given)
    target = output or Path("build/reward") / config.name
    if not show:
        config = add_ratings(config, ratings, target, fresh=not resume)
    if is_first_process():
        typer.echo(describe(config))
    if show:
        return
    from training.reward.report import summary
    from training.reward.train import train_reward

    report = train_reward(config, target, fresh=not resume)
    if report:
        typer.echo("\n".join(["", "Pair accuracy on held-out prompts, 95 % intervals:", *summary(report)]))
        typer.echo(f"{target}: milonga serve reward --model file:{target} --clap {config.clap}")


train.command()(new_command.new)
train.command()(preferences_command)
train.command()(finetune_commands.sft)
train.command()(finetune_commands.dpo)
train.command()(finetune_commands.baton)
train.command()(finetune_commands.distill)
train.command()(adapt_command.adapt)
train.command()(evaluate_command.evaluate)
train.command()(listen_command.listen)
train.command()(explanation_commands.evaluate_explanations)
train.command()(captioning_commands.captioning)
train.command()(captioning_commands.paraphrase)
train.command()(captioning_commands.evaluate_captions)
train.command()(tracking_cli.register)
train.command()(tracking_cli.sync)
train.command()(run_command.run)
train.command(epilog=submit_command.EPILOG)(submit_command.submit)


def _interactive() -> bool:
    import sys

    return sys.stderr.isatty()
