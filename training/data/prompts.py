"""Report prompts that a model does not read in full: unknown words, other languages, emoji, long prompts."""

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

EXAMPLES: Final = 5
"""Prompts that a report names."""
_SHOWN: Final = 80


class HasPrompt(Protocol):
    """An example with a prompt."""

    @property
    def prompt(self) -> str:
        """Text."""

    @property
    def place(self) -> str:
        """Row of a list; empty if it is of none."""


def places_of(examples: Iterable[HasPrompt]) -> dict[str, str]:
    """Return the place of each distinct prompt: the first row that has it."""
    places: dict[str, str] = {}
    for example in examples:
        places.setdefault(example.prompt, example.place)
    return places


def report_prompts(
    places: Mapping[str, str],
    warnings: Mapping[str, Sequence[str]] | Callable[[str], Sequence[str]],
    by: str,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Return the entry ``prompt_warnings`` of a stage's report, and print one line if there are any.

    Args:
        places: the row of each distinct prompt; empty if it is of none.
        warnings: sentences on a prompt; prompts without any may be missing.
        by: name of the model that reads them.
        quiet: print nothing.
    """
    found: dict[str, list[str]] = {}
    for prompt in places:
        sentences = warnings(prompt) if callable(warnings) else warnings.get(prompt, ())
        if sentences:
            found[prompt] = list(sentences)
    examples = [
        {"row": places[prompt], "prompt": prompt, "warnings": found[prompt]}
        for prompt in list(found)[:EXAMPLES]
    ]
    report = {"by": by, "prompts": len(places), "with_warnings": len(found), "examples": examples}
    if examples and not quiet:
        print(f"warning: {warning_line(report)}", file=sys.stderr)
    return {"prompt_warnings": report}


def warning_line(report: Mapping[str, Any]) -> str:
    """Return the sentence on an entry ``prompt_warnings`` with warnings."""
    first = report["examples"][0]
    place = first["row"] or repr(first["prompt"][:_SHOWN])
    return (
        f"{report['with_warnings']} of {report['prompts']} prompts are not read in full by {report['by']}; "
        f"the first: {place}: {'; '.join(first['warnings'])}"
    )


def on_prompts(*warnings: Iterable[str]) -> list[str]:
    """Return the distinct warnings of scorers or of a generation that are on the prompt."""
    return [one for one in dict.fromkeys(itertools.chain(*warnings)) if one.startswith("prompt ")]
