"""The field's metrics of captions, by ``aac-metrics``, with bootstrap intervals over clips.

    milonga train evaluate-captions captions.jsonl references.jsonl
    milonga train evaluate-captions captions.jsonl clotho_captions_evaluation.csv --metrics cider_d,fense

CIDEr-D, BLEU and ROUGE-L need nothing else. METEOR and the PTB tokenizer need Java and files, SPICE further
ones, and FENSE and the fluency errors of SPIDEr-FL need two models: `ADVICE` says how to get them. Without
the PTB tokenizer, captions are split at spaces, in small letters, without punctuation; the report says so.

Shape legend: N clips, R resamples.
"""

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.api.reading import EVENTS as EVENTS_FILE
from services.api.reading import EventReader, compare, read_events
from services.catalogue import captioner_uri
from services.errors import MilongaError, invalid
from services.weights.uri import resolve
from training.data.captions import CaptionExample, read_examples
from training.data.examples import FileClip
from training.evaluation.bootstrap import normal_interval, prompt_resamples
from training.evaluation.markdown import format_interval
from training.objectives.statistics import Interval, mean_interval

TEXT: Final = ("cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
JAVA: Final = ("meteor", "spice", "spider")
MODELS: Final = ("spider_fl", "fense")
METRICS: Final = (*TEXT, *JAVA, *MODELS)
"""Names of metrics, as `aac-metrics` has them."""
EVENTS: Final = ("events_named", "order_given_events", "nothing_added", "read_whole")
"""Metrics of a captioner whose events are known, by `services.api.reading`."""

ADVICE: Final = {
    "aac-metrics": "install it: pip install --no-deps aac-metrics==0.5.5 (its dependency msclap needs other "
    "versions), or by uv milonga[captioning-metrics]",
    "meteor": "needs java on the PATH and the file meteor-1.5.jar; run aac-metrics-download, or pip install "
    "--no-deps pycocoevalcap==1.2, which holds it",
    "spice": "needs java (8 to 13) on the PATH and SPICE-1.0 with Stanford CoreNLP 3.6.0; run "
    "aac-metrics-download where the internet can be reached, and set AAC_METRICS_CACHE_PATH to its folder",
    "fer": "needs the model echecker_clotho_audiocaps_base and bert-base-uncased's tokenizer; run "
    "aac-metrics-download where the internet can be reached, and copy ~/.cache",
    "sbert": "needs the package sentence-transformers and its model paraphrase-TinyBERT-L6-v2; load it once "
    "where the internet can be reached, and copy ~/.cache/huggingface",
}
"""What to do where a metric can't be computed."""

RESAMPLES: Final = 200
"""Resamples of BLEU, whose value for a set is no mean over its clips."""
FLUENCY_PENALTY: Final = 0.9
"""Share of a score that a fluency error costs (FENSE, arXiv 2110.04684)."""
_LISTED = 5

Scores = tuple[float, NDArray[np.float64]]
"""The value of the set, and the values of its clips [N]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSet:
    """Captions with their references, clip by clip."""

    clips: tuple[str, ...]
    """File names."""
    captions: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]


def evaluate_captions(
    captions: Path, references: Path, *, metrics: Sequence[str] = (), events: EventReader | None = None
) -> dict[str, Any]:
    """Return the metrics of captions with 95 % intervals over clips.

    Args:
        captions: list with one caption per clip.
        references: list with one or more captions per clip; clips are matched by their files' names.
        metrics: names from `METRICS`; none: all that can be computed without a download.
        events: reader of the captioner's wordings; adds the metrics `EVENTS`.

    Raises:
        InvalidInputError: a list can't be read, the clips differ, or there are fewer than two.
        MilongaError: a metric that was asked for can't be computed; says what is missing.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise invalid("--metrics", f"has {', '.join(unknown)}, must be of {', '.join(METRICS)}")
    return score_captions(match_captions(captions, references), metrics, events)


def score_captions(
    found: CaptionSet, metrics: Sequence[str] = (), events: EventReader | None = None
) -> dict[str, Any]:
    """Return the metrics of matched captions, as `evaluate_captions`."""
    with _java_files() as java:
        wanted = metrics or (
            *TEXT,
            *(JAVA[:1] if java.has("meteor") else ()),
            *(JAVA[1:] if java.has("spice") else ()),
        )
        tokenizer = "PTB" if java.has("tokenizer") else "words"
        texts, mult = _tokenized(found, java if tokenizer == "PTB" else None)
        figures = compute_metrics(texts, mult, wanted, java)
    if events is not None:
        figures |= event_figures(found, events)
    return {
        "clips": len(found.clips),
        "references": sum(map(len, found.references)),
        "tokenizer": tokenizer,
        "figures": {name: asdict(interval) for name, interval in figures.items()},
        "not_computed": [name for name in METRICS if name not in figures],
    }


def match_captions(captions: Path, references: Path) -> CaptionSet:
    """Match the captions of one list with those of another. Raises `InvalidInputError`."""
    made = _by_clip(read_examples(captions), captions)
    true = _by_clip(read_examples(references), references)
    if several := [name for name, texts in made.items() if len(texts) > 1]:
        listed = ", ".join(several[:_LISTED])
        raise invalid(
            "captions", f"{captions} has several captions for {len(several)} clips ({listed}); give one each"
        )
    for field, missing, path in (
        ("references", [name for name in made if name not in true], references),
        ("captions", [name for name in true if name not in made], captions),
    ):
        if missing:
            listed = ", ".join(missing[:_LISTED])
            raise invalid(
                field,
                f"{path} has no caption for {len(missing)} clips ({listed}); give lists of the same clips",
            )
    if len(made) < 2:
        raise invalid(
            "captions", f"has {len(made)} clip; CIDEr-D weighs words by their clips, give 2 or more"
        )
    return CaptionSet(
        clips=tuple(made),
        captions=tuple(texts[0] for texts in made.values()),
        references=tuple(tuple(true[name]) for name in made),
    )


def compute_metrics(
    captions: Sequence[str], references: Sequence[Sequence[str]], wanted: Sequence[str], java: "JavaFiles"
) -> dict[str, Interval]:
    """Return metrics of tokenised captions by name. Raises `MilongaError` if one can't be computed."""
    made, true = list(captions), [list(texts) for texts in references]
    scores: dict[str, Scores] = {}

    def call(module: str, advice: str, **options: Any) -> Scores:
        function = getattr(_metric_module(module), module)
        try:
            whole, parts = function(*((made,) if module == "fer" else (made, true)), **options)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise _refused(module, advice, error) from error
        return float(whole[module]), parts[module].double().numpy()

    needed = set(wanted)
    needed |= {"cider_d", "spice"} if needed & {"spider", "spider_fl"} else set()
    if "cider_d" in needed:
        scores["cider_d"] = call("cider_d", "aac-metrics")
    if "rouge_l" in needed:
        scores["rouge_l"] = call("rouge_l", "aac-metrics")
    if "meteor" in needed:
        scores["meteor"] = call("meteor", "meteor", **java.options("meteor"))
    if "spice" in needed:
        scores["spice"] = call("spice", "spice", **java.options("spice"))
    if needed & {"spider", "spider_fl"}:
        scores["spider"] = _mean((scores["cider_d"][1] + scores["spice"][1]) / 2)
    if needed & set(MODELS):
        _, errors_N = call("fer", "fer")
        penalty_N = 1 - FLUENCY_PENALTY * errors_N
        if "spider_fl" in needed:
            scores["spider_fl"] = _mean(scores["spider"][1] * penalty_N)
        if "fense" in needed:
            scores["fense"] = _mean(call("sbert_sim", "sbert")[1] * penalty_N)
    figures = {name: _interval(*scores[name]) for name in wanted if name in scores}
    figures |= {name: _bleu(made, true, int(name[-1])) for name in wanted if name.startswith("bleu_")}
    return {name: figures[name] for name in METRICS if name in figures}


def event_figures(found: CaptionSet, reader: EventReader) -> dict[str, Interval]:
    """Return the metrics `EVENTS`: captions are compared with the first reference by what they say."""
    columns: dict[str, list[float]] = {name: [] for name in EVENTS}
    for caption, references in zip(found.captions, found.references, strict=True):
        reading = reader.read(caption)
        comparison = compare(reader.read(references[0]), reading)
        columns["events_named"].append(float(not comparison.missing))
        columns["order_given_events"].append(
            float("nan") if comparison.in_order is None else float(comparison.in_order)
        )
        columns["nothing_added"].append(float(not comparison.added))
        columns["read_whole"].append(float(not reading.unread))
    intervals = {name: mean_interval(values, found.clips) for name, values in columns.items()}
    return {name: interval for name, interval in intervals.items() if interval.count}


@dataclass(frozen=True, kw_only=True, slots=True)
class JavaFiles:
    """Java, and the folder whose layout `aac-metrics` expects."""

    java: str | None
    cache: Path

    def has(self, what: str) -> bool:
        """Return whether Java is there, and the files of ``tokenizer``, ``meteor`` or ``spice``."""
        files = {
            "tokenizer": "stanford_nlp/stanford-corenlp-3.4.1.jar",
            "meteor": "meteor/meteor-1.5.jar",
            "spice": "spice/lib/stanford-corenlp-3.6.0.jar",
        }
        return self.java is not None and (self.cache / "aac-metrics" / files[what]).exists()

    def options(self, what: str) -> dict[str, Any]:
        """Return the arguments of a metric. Raises `MilongaError` if its files are missing."""
        if not self.has(what):
            raise _refused(what, what, None)
        return {"cache_path": str(self.cache), "java_path": self.java}


@contextmanager
def _java_files() -> Iterator[JavaFiles]:
    """Yield the files of `aac-metrics-download`, or those of pycocoevalcap in the same layout."""
    java = shutil.which(os.environ.get("AAC_METRICS_JAVA_PATH", "java"))
    cache = Path(os.environ.get("AAC_METRICS_CACHE_PATH", "~/.cache")).expanduser()
    spec = importlib.util.find_spec("pycocoevalcap")
    if (cache / "aac-metrics").is_dir() or spec is None or not spec.submodule_search_locations:
        yield JavaFiles(java=java, cache=cache)
        return
    package = Path(spec.submodule_search_locations[0])
    with tempfile.TemporaryDirectory(prefix="milonga-") as folder:
        target = Path(folder) / "aac-metrics"
        target.mkdir()
        (target / "meteor").symlink_to(package / "meteor")
        (target / "stanford_nlp").symlink_to(package / "tokenizer")
        yield JavaFiles(java=java, cache=Path(folder))


def _metric_module(name: str) -> Any:
    """Import a module of `aac-metrics` without its package, which would import packages that we don't use.

    Raises `MilongaError` if it is not installed.
    """
    for package in ("aac_metrics", "aac_metrics.functional", "aac_metrics.utils"):
        if package in sys.modules:
            continue
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise _refused("every metric", "aac-metrics", None)
        sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        module: Any = importlib.import_module(
            f"aac_metrics.{'utils' if name == 'tokenization' else 'functional'}.{name}"
        )
    except ImportError as error:
        raise _refused(name, {"fer": "fer", "sbert_sim": "sbert"}.get(name, "aac-metrics"), error) from error
    if name in ("meteor", "tokenization"):
        # The package refuses Java 14 and later for all of them; only SPICE does not run there.
        module.check_java_path = lambda path: True
    return module


def _tokenized(found: CaptionSet, java: JavaFiles | None) -> tuple[list[str], list[list[str]]]:
    """Return captions and references as tokens with spaces between."""
    flat = [*found.captions, *(text for texts in found.references for text in texts)]
    if java is None:
        flat = [" ".join(_words(text)) for text in flat]
    else:
        tokenize = _metric_module("tokenization").preprocess_mono_sents
        flat = list(tokenize(flat, **java.options("tokenizer")))
    rest = iter(flat[len(found.captions) :])
    return flat[: len(found.captions)], [[next(rest) for _ in texts] for texts in found.references]


def _words(text: str) -> list[str]:
    """Return the words of a caption in small letters, articles included."""
    return "".join(one if one.isalnum() or one in "'’-" else " " for one in text.lower()).split()


def _bleu(captions: list[str], references: list[list[str]], n: int) -> Interval:
    """Return BLEU of the set, with an interval of resampled sets within 0 and 1."""
    bleu = partial(_metric_module("bleu").bleu, return_all_scores=False, n=n)
    resampled = [
        float(bleu([captions[i] for i in picks], [references[i] for i in picks]))
        for picks in prompt_resamples(len(captions), RESAMPLES)
    ]
    found = normal_interval(float(bleu(captions, references)), resampled, len(captions))
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def _interval(value: float, scores_N: NDArray[np.float64]) -> Interval:
    """Return the value of a set, which may be no mean, with the interval's width of its clips' mean."""
    mean = mean_interval(scores_N, list(map(str, range(len(scores_N)))))
    shift = value - mean.value
    return Interval(value=value, low=mean.low + shift, high=mean.high + shift, count=mean.count)


def _mean(scores_N: NDArray[np.float64]) -> Scores:
    return float(scores_N.mean()), scores_N


def _by_clip(examples: Sequence[CaptionExample], path: Path) -> dict[str, list[str]]:
    """Return the captions of each clip by its file's name."""
    found: dict[str, list[str]] = defaultdict(list)
    paths: dict[str, Path] = {}
    for example in examples:
        assert isinstance(example.clip, FileClip)
        clip = example.clip.path
        if paths.setdefault(clip.name, clip) != clip:
            raise invalid(
                str(path), f"has two clips named {clip.name}: {paths[clip.name]} and {clip}; rename one"
            )
        found[clip.name].append(example.caption)
    return found


def _refused(metric: str, advice: str, error: Exception | None) -> MilongaError:
    reason = (
        f" ({str(error).strip().partition(chr(10))[0][:200]})" if error is not None and str(error) else ""
    )
    return MilongaError(f"{metric} can't be computed{reason}: {ADVICE[advice]}")


def event_reader(uri: str) -> EventReader:
    """Return the reader of a captioner's list of events.

    Raises `ModelError` if the model is not there, `InvalidInputError` if it has no list.
    """
    if (reader := read_events(resolve(captioner_uri(uri)).folder)) is None:
        raise invalid("--events", f"is {uri}, which has no {EVENTS_FILE}; give a captioner that has one")
    return reader


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a report as lines of text."""
    lines = [
        f"{report['clips']} clips, {report['references']} references; tokens by "
        f"{'the PTB tokenizer' if report['tokenizer'] == 'PTB' else 'spaces, without punctuation'}; "
        "mean [95 % interval over clips]"
    ]
    lines += [f"{name:20} {format_interval(figure)}" for name, figure in report["figures"].items()]
    missing = [name for name in report["not_computed"] if name not in report["figures"]]
    if missing:
        lines.append(f"not computed: {', '.join(missing)}; name them with --metrics to see what they need")
    return lines
