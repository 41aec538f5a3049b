"""The pages agree with the sources: commands parse, links and names exist, layers are pyproject's."""

import ast
import posixpath
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main

from services.cli import COMMAND_GROUP, build_app

ROOT: Final = Path(__file__).parents[1]
ARCHITECTURE: Final = ROOT / "docs/architecture.md"
PAGES: Final = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "services/models/mini/README.md")
    for path in ROOT.glob(pattern)
)

FENCE: Final = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")
CODE: Final = re.compile(r"`([^`\n]+)`")
PROGRAM: Final = re.compile(
    r"^(?:\$ |! )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:milonga|\S*python3? -m services\.cli) "
)
LAUNCHED: Final = re.compile(r"^accelerate launch (?:--?\S+ )*-m services\.cli ")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fenced_commands(text: str) -> Iterator[str]:
    """The commands of `milonga` in code blocks, one each, without continuation lines and comments."""
    for block in FENCE.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            for command in re.split(r" \| | && |; | >>? ", line.strip()):
                found = PROGRAM.match(command) or LAUNCHED.match(command)
                if found:
                    yield command[found.end() :]


@cache
def milonga() -> Any:
    """The command, also with entry points that the environment was installed without."""
    app = build_app()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {entry.name for entry in entry_points(group=COMMAND_GROUP)}
    for name, value in project["entry-points"][COMMAND_GROUP].items():
        if name not in known:
            app.add_typer(EntryPoint(name, value, COMMAND_GROUP).load(), name=name)
    return typer.main.get_command(app)


def words_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return [word for word in words if word not in ("&", "…")]


def parse(command: str, *, complete: bool) -> None:
    """Walk down to the sub-command that `command` names, and let its parser take the rest.

    `complete`: arguments that the sub-command requires must be there.
    """
    words, found = words_of(command), milonga()
    context = found.context_class(found, info_name="milonga", resilient_parsing=True)
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        assert words[0] in found.commands, f"no command {words[0]!r} among {', '.join(found.commands)}"
        found = found.commands[words.pop(0)]
    parser = found.make_parser(found.context_class(found, parent=context, info_name=found.name))
    given, left, _ = parser.parse_args(args=words)
    assert not left, f"unexpected arguments: {left}"
    if complete:
        missing = [one.name for one in found.params if one.required and not given.get(str(one.name))]
        assert not missing, f"missing arguments: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_code_blocks_parse(page: Path) -> None:
    faults = []
    for command in fenced_commands(page.read_text(encoding="utf-8")):
        try:
            parse(command, complete=True)
        except Exception as error:
            faults.append(f"milonga {command}: {getattr(error, 'message', error)}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_prose_exist(page: Path) -> None:
    """Placeholders are in capitals, as in `milonga serve SERVICE --help`; values may be left out."""
    if page.name == "CHANGELOG.md":
        pytest.skip("names commands of the past")
    faults = []
    for code in CODE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if code.startswith("milonga ") and not re.search(r" [A-Z]+\b", code.partition("=")[0]):
            try:
                parse(code.removeprefix("milonga "), complete=False)
            except Exception as error:
                message = getattr(error, "message", str(error))
                if "requires an argument" not in message:
                    faults.append(f"{code}: {message}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    text = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    dead = [link for link in LINK.findall(text) if not (page.parent / link).is_file()]
    assert not dead


def defined(tree: ast.AST, dotted: str) -> bool:
    """Whether a module defines a class, function, constant, method or field."""
    name, _, rest = dotted.partition(".")
    for node in getattr(tree, "body", []):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
        if name in names:
            return not rest or defined(node, rest)
    return False


def rows_of(section: str) -> list[list[str]]:
    """The cells of the table under a heading of docs/architecture.md, without its head."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    body = re.split(r"^## ", text.split(f"## {section}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_every_answer_names_a_file_and_what_it_defines() -> None:
    rows = rows_of("Where is …?")
    assert len(rows) >= 10
    for question, answer in rows:
        trees: dict[str, ast.AST] = {}
        paths = [posixpath.normpath(f"docs/{link}") for link in LINK.findall(answer)]
        assert paths, f"{question}: no file"
        for path in paths:
            assert (ROOT / path).is_file(), f"{question}: {path}"
            if path.endswith(".py"):
                trees[path] = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        prose = re.sub(r"\[[^]]*\]\([^)]*\)", "", answer)
        for name in (code for code in CODE.findall(prose) if "/" not in code):
            assert any(defined(tree, name) for tree in trees.values()), (
                f"{question}: {name} is not in {paths}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_in_prose_exist(page: Path) -> None:
    """Of files from the repository's root; those of the architecture page also from a package's."""
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    starts = ("", "services", "training") if page == ARCHITECTURE else ("",)
    if page.name == "CHANGELOG.md":
        pytest.skip("names files of the past")
    missing = [
        code
        for code in CODE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
        if re.fullmatch(r"[a-z0-9_.-]+(/[\w.-]+)+/?", code)
        and not re.search(r"/[A-Z]+\b", code.replace("README", ""))
        and (code.split("/")[0] in tops or page == ARCHITECTURE)
        and not code.startswith("build/")
        and not any((ROOT / start / code).exists() for start in starts)
    ]
    assert not missing


@pytest.mark.parametrize("package", ["services", "training"])
def test_the_layers_are_those_of_pyproject(package: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one.get("containers") == [package])
    shown = [re.sub(r"[`,]", "", row[0]).split() for row in rows_of(f"Layers of `{package}/`")]
    assert shown == [layer.split(" | ") for layer in layers]
