"""`milonga ratings`: plan blind pairs, admit raters, see how far they agree, export training data."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.making import to_json
from services.cli.options import check_address
from services.client.addresses import address_fault
from services.errors import invalid
from services.lists import read_list

if TYPE_CHECKING:
    from services.api.model import ModelVersion
    from services.ratings.planning import Make
    from services.ratings.store import RatingStore

app = typer.Typer(help="Ratings of blind pairs by people.", no_args_is_help=True)

Database = Annotated[
    str,
    typer.Option(
        "--ratings",
        envvar="MILONGA_RATINGS",
        help="Database: sqlite:///FILE, or postgresql://USER@HOST/NAME.",
    ),
]
_DEFAULT = "sqlite:///ratings.db"
SECOND_SEED = 1_000_000
"""Added to the seeds of a model's second clips, if both sides are one model."""
_ALIASES = ("champion", "challenger")


@contextlib.contextmanager
def _store(url: str, *, create: bool = False) -> Iterator["RatingStore"]:
    from services.ratings.store import RatingStore

    store = RatingStore(url, "--ratings", create=create)
    try:
        yield store
    finally:
        store.close()


@app.command()
def plan(
    a: Annotated[
        str,
        typer.Option(help="A model: its URI, champion, challenger, or the address of a generation service."),
    ],
    b: Annotated[str, typer.Option(help="The other model.")],
    prompts: Annotated[Path, typer.Option(help="List of prompts: CSV, TSV, JSON or Parquet.")],
    ratings: Database = _DEFAULT,
    name: Annotated[
        str, typer.Option(help="Registered model that the aliases champion and challenger are of.")
    ] = "milonga-tango",
    seed: Annotated[int, typer.Option(min=0, help="Of the clips, the sides and the choice of repeats.")] = 0,
    repeats: Annotated[float, typer.Option(help="Hidden repeats, as a share of the prompts.")] = 0.1,
    known: Annotated[float, typer.Option(help="Pairs with a known answer, as a share of the prompts.")] = 0.1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. Default: the models'.")] = None,
) -> None:
    """Make the clips of both models, and add a blind pair per prompt."""
    from services.ratings.planning import plan_items

    texts = [entry.prompt for entry in read_list(prompts, "--prompts", clip="ignored")]
    uris = _uri(a, name), _uri(b, name)
    with _store(ratings, create=True) as store, _maker(uris[0], "--a", steps) as (make_a, model_a):
        with _maker(uris[1], "--b", steps) as (make_b, model_b):
            same = model_a.digest == model_b.digest
            second = _with_other_noise(make_b) if same else make_b
            items = list(plan_items(texts, make_a, second, seed=seed, repeats=repeats, known=known))
        study = store.add_study(a, b, seed, items, (model_a, model_b))
    if same:
        typer.echo(f"a and b are one model, {model_a.name} {model_a.version}: its clips of two seeds each")
    typer.echo(f"study {study}: {len(items)} pairs, of {len(texts)} prompts")


@app.command()
def rater(
    name: Annotated[str, typer.Argument(help="A name that the rater chooses; it need not be theirs.")],
    ratings: Database = _DEFAULT,
) -> None:
    """Admit a rater; print their token, with which they rate on the studio's page."""
    with _store(ratings, create=True) as store:
        typer.echo(store.add_rater(name))


@app.command()
def show(
    ratings: Database = _DEFAULT,
    min_known: Annotated[
        float,
        typer.Option(
            help="Leave out raters who answer less than this share of the known pairs right.", min=0, max=1
        ),
    ] = 0.0,
    require: Annotated[
        float | None,
        typer.Option(
            help="End with exit code 2 unless b's win rate is certain (95 %) to be above this share: a gate "
            "before milonga promote.",
            min=0,
            max=1,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print counts, agreement, reliability and b's win rate as JSON."""
    from services.ratings.export import reliable
    from services.ratings.store import summary

    with _store(ratings) as store:
        found = summary(reliable(store.ratings(), min_known))
    typer.echo(to_json(found))
    low, high = found["win_rate_interval"]
    if require is not None and low <= require:
        raise invalid(
            "--require",
            f"is {require:g}, but the win rate of b is between {low:.3f} and {high:.3f} on "
            f"{found['prompts']} rated prompts; have more pairs rated, or keep a",
        )


@app.command()
def export(
    output: Annotated[
        Path, typer.Argument(help="pairs.parquet: Audio-alpaca's pairs; labels.json: BATON's labels.")
    ],
    ratings: Database = _DEFAULT,
    min_known: Annotated[
        float,
        typer.Option(
            help="Leave out raters who answer less than this share of the known pairs right.", min=0, max=1
        ),
    ] = 0.0,
) -> None:
    """Write the ratings as training data, for milonga train reward, dpo and baton."""
    from services.ratings.export import export_labels, export_pairs, reliable

    formats: dict[str, Callable[..., int]] = {".parquet": export_pairs, ".json": export_labels}
    if output.suffix not in formats:
        raise invalid("OUTPUT", f"is {output}, must end in .parquet (pairs) or .json (labels)")
    with _store(ratings) as store:
        count = formats[output.suffix](store, reliable(store.ratings(), min_known), output)
    typer.echo(f"{output}: {count} {'pairs' if output.suffix == '.parquet' else 'labelled clips'}")


def _uri(text: str, name: str) -> str:
    return f"models:/{name}@{text}" if text in _ALIASES else text


def _with_other_noise(make: "Make") -> "Make":
    return lambda prompt, seed: make(prompt, seed + SECOND_SEED)


@contextlib.contextmanager
def _maker(text: str, flag: str, steps: int | None) -> Iterator[tuple["Make", "ModelVersion"]]:
    """Yield what makes a model's clips, and its version: by a service if `text` is an address, or here."""
    from services.api.generation import StreamingClipMaker

    maker: StreamingClipMaker
    if (
        ":" in text
        and "/" not in text
        and address_fault(text) is None
        and text.rpartition(":")[2].isdecimal()
    ):
        from services.client import AudioClient

        check_address(flag, text)
        maker = AudioClient(text)
    else:
        from services.local import open_clip_maker
        from services.weights.uri import resolve

        maker = open_clip_maker(resolve(text))
    try:
        model = maker.get_model().model

        def make(prompt: str, seed: int) -> bytes:
            made = maker.generate(prompt, seed=seed, num_inference_steps=steps, encoding="flac")
            if made.model.digest != model.digest:
                raise invalid(flag, f"is {text}, whose model was switched meanwhile; plan again")
            return made.clips[0].audio

        yield make, model
    finally:
        maker.close()
