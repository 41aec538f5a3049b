"""`milonga train captioning`, `paraphrase`, `evaluate-captions`. Light: they import what they need at call.

milonga train captioning --recipe mini
milonga train paraphrase captions.jsonl --set paraphraser=grammar -o build/paraphrases
milonga train evaluate-captions captions.jsonl references.jsonl
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from training.commands.options import Resume, Settings, Show, is_first_process


def captioning(
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="mini, smoke, slam-aac-pretrain, slam-aac-audiocaps, slam-aac-clotho."),
    ] = "mini",
    settings: Settings = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the model.", show_default="build/captioning/NAME"),
    ] = None,
    resume: Resume = True,
    track: Annotated[bool, typer.Option("--track", help="Send settings and curves to MLflow.")] = False,
    show: Show = False,
) -> None:
    """Train a captioner: its projector, and adapters of its language model, on clips with captions."""
    from training.loop.config import describe, flatten, override
    from training.runs import recipes

    config = override(recipes.recipe(recipes.CAPTIONING, recipe), settings or [])
    main = is_first_process()
    if main:
        typer.echo(describe(config))
    if show:
        return
    from training.captioning.folder import summary
    from training.captioning.train import train_captioner

    target = output or Path("build/captioning") / config.name
    if track and main:
        from training.loop.run_folder import JOURNAL
        from training.tracking.runs import Tracker

        run = target.with_name(f"{target.name}.run")
        tracker = Tracker(config.name, run / "tracking", params=flatten(config))
        with tracker, tracker.stage("captioning") as stage:
            stage.follow(run / JOURNAL)
            report = train_captioner(config, target, fresh=not resume)
            stage.log_metrics(report["figures"])
    else:
        report = train_captioner(config, target, fresh=not resume)
    if main:
        typer.echo("\n".join(["", *summary(report)]))
        typer.echo(f"{target}: milonga serve captioning --model file:{target}")


def paraphrase(
    captions: Annotated[
        Path, typer.Argument(help="List of captions with their clips: JSON Lines, CSV, …", show_default=False)
    ],
    settings: Settings = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for paraphrased.jsonl.")] = Path(
        "build/paraphrases"
    ),
    show: Show = False,
) -> None:
    """Write further captions of the same clips, by a language model or the sound world's grammar."""
    from training.captioning.paraphrase import PARAPHRASED, ParaphraseConfig, paraphrase_captions
    from training.loop.config import describe, override

    config = override(ParaphraseConfig(source=captions), settings or [])
    typer.echo(describe(config))
    if show:
        return
    report = paraphrase_captions(config, output)
    typer.echo(f"{report['made']} paraphrases of {report['captions']} captions: {output / PARAPHRASED}")
    if report["without_any"]:
        typer.echo(f"{report['without_any']} captions have none", err=True)


def evaluate_captions(
    captions: Annotated[
        Path,
        typer.Argument(
            help="Captions, one per clip, as `milonga caption --folder` writes them.", show_default=False
        ),
    ],
    references: Annotated[
        Path, typer.Argument(help="List with the true captions of the same clips.", show_default=False)
    ],
    metrics: Annotated[
        str | None,
        typer.Option(
            help="With commas: cider_d, bleu_1 … bleu_4, rouge_l, meteor, spice, spider, spider_fl, fense.",
            show_default="those that need no download",
        ),
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(
            help="URI of a captioner with a list of events: also compare the events that captions name.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Compare captions with true ones by the field's metrics, with intervals over clips."""
    from training.evaluation.caption_metrics import evaluate_captions, event_reader, report_lines

    names = [name.strip() for name in (metrics or "").split(",") if name.strip()]
    reader = event_reader(events) if events else None
    report = evaluate_captions(captions, references, metrics=names, events=reader)
    typer.echo(json.dumps(report) if as_json else "\n".join(report_lines(report)))
