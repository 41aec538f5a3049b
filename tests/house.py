"""Measure the sources: sizes, floors, circles of imports, long functions, and whether README's tree is true.

    python -m tests.house            # the table: what was measured on 2026-11-27, and what is there now
    python -m tests.house --check    # the limits; exit status 1 where one is broken (`make lint-house`)
    python -m tests.house --runs     # the table, with what one smoke run hashes and resolves (half a minute)

A line of code carries a token of Python other than a comment or a docstring. The string below a field or a
constant is a docstring too. The core is what the servicers and the trainers import, directly or not; the rest
are rings around it. Which of them it must never import, a rule of import-linter in pyproject.toml says.
"""

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator, Mapping, Set
from contextlib import chdir
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import grimp
from rich.console import Console
from rich.table import Column, Table

ROOT = Path(__file__).parents[1]
PACKAGES = ("services", "training")

CONTRACT = "the core imports nothing that is built around it"
"""Name of the import rule in pyproject.toml whose sources are the core's roots."""

MAX_CORE = 16_540
"""Lines of code, exclusive."""
MAX_FUNCTION = 80
"""Lines of a function from `def` to its end, docstring included."""

HASHED = "a smoke run hashes model folders"
RESOLVED = "a smoke run resolves URIs"

OLD: Mapping[str, str] = {
    "lines": "38,720",
    "lines of code": "26,850",
    "core: lines of code": "9,567",
    "    serve": "6,277",
    "    learn": "3,290",
    "rings: lines of code": "17,283",
    "services/, top floor: files, folders": "6, 10",
    "training/, top floor: files, folders": "48, 5",
    "circles of imports": "2",
    f"functions over {MAX_FUNCTION} lines": "4",
    "median lines of a function": "7",
    "functions with every type": "100 %",
    HASHED: "48 times, 353 MB",
    RESOLVED: "39",
}
"""As measured on 2026-11-27, before the redesign; the core as it is defined here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    name: str
    lines: int
    typed: bool
    """Whether every parameter and the result carry a type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    path: Path
    """Relative to the repository."""
    name: str
    """Dotted."""
    lines: int
    code: int
    functions: tuple[Function, ...]

    @property
    def folder(self) -> str:
        return self.path.parent.as_posix()


class House:
    """What is measured of the sources below a folder."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    @cached_property
    def modules(self) -> list[Module]:
        """Every module of the two packages, by path."""
        return [
            read(path, path.relative_to(self._root))
            for package in PACKAGES
            for path in sorted((self._root / package).rglob("*.py"))
        ]

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """By module what it imports directly, of our own: also inside functions, and for types only."""
        graph = grimp.build_graph(*PACKAGES, cache_dir=None)
        return {name: graph.find_modules_directly_imported_by(name) for name in sorted(graph.modules)}

    @cached_property
    def functions(self) -> list[tuple[Module, Function]]:
        return [(module, function) for module in self.modules for function in module.functions]

    @cached_property
    def serve(self) -> set[str]:
        """The modules of the core that the servicers import."""
        return self._core("services")

    @cached_property
    def learn(self) -> set[str]:
        """The modules of the core that only the trainers import."""
        return self._core("training") - self.serve

    def _core(self, package: str) -> set[str]:
        with (self._root / "pyproject.toml").open("rb") as file:
            contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
        (roots,) = (one["source_modules"] for one in contracts if one["name"] == CONTRACT)
        seeds = [name for name in self.imports if any(below(name, root) for root in roots)]
        ours = [name for name in seeds if below(name, package)]
        return {*ours, *(name for seed in ours for name in reach(seed, self.imports))}

    def code(self, names: Set[str] | None = None) -> int:
        """Lines of code of modules, or of all."""
        return sum(module.code for module in self.modules if names is None or module.name in names)

    def long_functions(self) -> list[str]:
        """The functions over the limit, longest first."""
        found = [(function.lines, f"{module.path}: {function.name}") for module, function in self.functions]
        return [
            f"{place}, {lines} lines" for lines, place in sorted(found, reverse=True) if lines > MAX_FUNCTION
        ]

    def circles(self) -> list[str]:
        """Circles of modules or folders that lie in one folder, at every depth."""
        return [
            f"{package}: {' -> '.join(circle)}"
            for package in sorted({name.rpartition(".")[0] for name in self.imports})
            for circle in circles_of(siblings(package, self.imports))
        ]

    def tree_faults(self) -> list[str]:
        """Return the differences between README's tree and the repository's."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=self._root,
            check=True,
            capture_output=True,
            text=True,
        )
        files = {Path(line) for line in listed.stdout.splitlines() if (self._root / line).exists()}
        there = {path.as_posix() for file in files for path in (file, *file.parents)}
        named = set(tree_paths((self._root / "README.md").read_text(encoding="utf-8")))
        folders = {
            path.as_posix()
            for file in files
            for path in file.parents
            if path.parent.as_posix() in (".", *PACKAGES) and not path.name.startswith(".") and path.name
        }
        covered = {parent.as_posix() for path in named for parent in (Path(path), *Path(path).parents)}
        return [
            *(f"README's tree names {path}, which is not there" for path in sorted(named - there)),
            *(f"README's tree does not name {path}/" for path in sorted(folders - covered)),
        ]

    def broken(self) -> list[str]:
        """Return a sentence for each broken limit."""
        core = self.code(self.serve | self.learn)
        return [
            *([f"the core has {core:,} lines of code, {MAX_CORE:,} or more"] if core >= MAX_CORE else []),
            *(f"a function over {MAX_FUNCTION} lines: {line}" for line in self.long_functions()),
            *(f"a circle of imports in {line}" for line in self.circles()),
            *self.tree_faults(),
        ]


def read(path: Path, relative: Path) -> Module:
    """Measure one file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    return Module(
        path=relative,
        name=".".join(relative.with_suffix("").parts).removesuffix(".__init__"),
        lines=len(source.splitlines()),
        code=lines_of_code(source, tree),
        functions=tuple(
            Function(name=node.name, lines=(node.end_lineno or 0) - node.lineno + 1, typed=is_typed(node))
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ),
    )


def lines_of_code(source: str, tree: ast.Module) -> int:
    """Return the number of lines with a token other than a comment or a docstring."""
    blank = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in blank
        for line in range(token.start[0], token.end[0] + 1)
    }
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return len(lines - docstrings)


def is_typed(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether the result and every parameter but `self` and `cls` are annotated."""
    arguments = function.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    return function.returns is not None and all(
        one.annotation is not None for one in every if one is not None and one.arg not in ("self", "cls")
    )


def below(module: str, package: str) -> bool:
    """Return whether a module is the package or lies in it."""
    return f"{module}.".startswith(f"{package}.")


def siblings(package: str, imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the children of a package that each child imports, each with all modules in it."""
    prefix = f"{package}." if package else ""
    arrows: dict[str, set[str]] = {}
    for importer, imported in imports.items():
        if importer.startswith(prefix):
            child = importer.removeprefix(prefix).split(".")[0]
            targets = {
                name.removeprefix(prefix).split(".")[0] for name in imported if name.startswith(prefix)
            }
            arrows.setdefault(child, set()).update(targets - {child})
    return arrows


def circles_of(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups whose members reach each other."""
    reached = {name: set(reach(name, arrows)) for name in arrows}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached.get(other, ())))
        for name in arrows
        if name in reached[name]
    }
    return sorted(map(list, groups))


def reach(start: str, arrows: Mapping[str, set[str]]) -> Iterator[str]:
    """Return the nodes that are reached from `start` by one arrow or more."""
    seen, left = set[str](), list(arrows[start])
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left.extend(arrows.get(name, ()))
            yield name


def tree_paths(readme: str) -> Iterator[str]:
    """Return the paths in README's tree, nested by indentation: the cells before their descriptions."""
    block = re.search(r"^## The tree\n+```\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    if block is None:
        return
    parents: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        indentation = len(line) - len(line.lstrip())
        cells = re.split(r" {2,}", line.strip())
        names = [
            cell for cell in cells if " " not in cell and ("/" in cell or "." in cell or cell[0].isupper())
        ]
        parents = [parent for parent in parents if parent[0] < indentation]
        prefix = parents[-1][1] if parents else ""
        for name in cells[: len(names)]:
            yield f"{prefix}{name}".rstrip("/")
        if names and names[-1].endswith("/"):
            parents.append((indentation, f"{prefix}{names[-1]}"))


def smoke_run() -> dict[str, str]:
    """Return what `milonga train run --recipe smoke` hashes and resolves, with a new registry and cache."""
    from tests.training.runs.counting import counting
    from training.runs.run import run_loop
    from training.runs.run_recipes import run_smoke

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with TemporaryDirectory() as folder, chdir(folder), counting() as counts:
        os.environ["MILONGA_CACHE"] = f"{folder}/cache"
        run_loop(run_smoke(), Path(folder) / "run")
        times, size = counts.hashed.total(), sum(counts.size) / 1e6
        return {
            HASHED: f"{times} times ({len(counts.hashed)} folders), {size:.0f} MB",
            RESOLVED: f"{counts.resolved.total()} ({len(counts.resolved)} URIs)",
        }


def figures(house: House) -> dict[str, str]:
    """Return the present values of the figures in `OLD`."""
    modules, functions = house.modules, [function for _, function in house.functions]
    total, core = house.code(), house.code(house.serve | house.learn)
    return {
        "lines": f"{sum(module.lines for module in modules):,}",
        "lines of code": f"{total:,}",
        "core: lines of code": f"{core:,}",
        "    serve": f"{house.code(house.serve):,}",
        "    learn": f"{house.code(house.learn):,}",
        "rings: lines of code": f"{total - core:,}",
        **{f"{package}/, top floor: files, folders": top_floor(modules, package) for package in PACKAGES},
        "circles of imports": str(len(house.circles())),
        f"functions over {MAX_FUNCTION} lines": str(len(house.long_functions())),
        "median lines of a function": f"{median(function.lines for function in functions):.0f}",
        "median lines of a module": f"{median(module.lines for module in modules if module.lines):.0f}",
        "functions with every type": f"{sum(function.typed for function in functions) / len(functions):.1%}",
    }


def top_floor(modules: list[Module], package: str) -> str:
    """Return the numbers of files, and of folders with files in them, directly in a package."""
    inside = [module.path.parts for module in modules if module.path.parts[0] == package]
    files = [parts for parts in inside if len(parts) == 2 and parts[1] != "__init__.py"]
    return f"{len(files)}, {len({parts[1] for parts in inside if len(parts) > 2})}"


def floors(module: Module) -> list[str]:
    """Return the package of a module, and its folder directly in the package."""
    parts = module.path.parts
    return [parts[0], "/".join(parts[:2])] if len(parts) > 2 else [parts[0]]


def print_tables(house: House, runs: Mapping[str, str]) -> None:
    """Print the figures next to the old ones, then sizes by folder and the longest modules."""
    console = Console()
    table = Table("what", Column("2026-11-27", justify="right"), Column("now", justify="right"))
    for name, value in {**figures(house), **runs}.items():
        table.add_row(name, OLD.get(name, ""), value)
    console.print(table)
    sizes = Table(
        "folder", *(Column(name, justify="right") for name in ("files", "lines", "code", "of it core"))
    )
    for folder in sorted({folder for module in house.modules for folder in floors(module)}):
        inside = [module for module in house.modules if folder in floors(module)]
        core = sum(module.code for module in inside if module.name in house.serve | house.learn)
        sizes.add_row(
            folder,
            f"{len(inside)}",
            f"{sum(module.lines for module in inside):,}",
            f"{sum(module.code for module in inside):,}",
            f"{core:,}" if core else "",
        )
    console.print(sizes)
    longest = sorted(house.modules, key=lambda module: -module.lines)[:10]
    console.print("longest modules:", *(f"  {module.lines} {module.path}" for module in longest), sep="\n")


def main() -> int:
    """Print the figures, or the broken limits with `--check`; return 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tests.house", description="Measure the sources.")
    parser.add_argument("--check", action="store_true", help="only name the limits that are broken")
    parser.add_argument("--runs", action="store_true", help="count also what one smoke run hashes")
    arguments = parser.parse_args()
    house = House()
    if arguments.check:
        broken = house.broken()
        print(*broken, sep="\n") if broken else print(
            f"core: {house.code(house.serve | house.learn):,} lines of code; no limit is broken"
        )
        return int(bool(broken))
    print_tables(house, smoke_run() if arguments.runs else {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
