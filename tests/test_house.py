"""The program that measures the sources: it counts what it says, and finds what breaks a limit."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.house import House, circles_of, lines_of_code, read, siblings, tree_paths

SOURCE = '''"""A module
of two lines."""

# A comment.
import os

LIMIT = 3
"""A constant's docstring."""
TEXT = """a text
that is no docstring"""


def shown(self, a: int, *, b: str = "") -> str:  # counts
    """A docstring."""
    return (
        b
    )


async def untyped(a, *rest: int) -> None:
    os.remove(a)
'''


def test_lines_of_code_are_without_comments_and_docstrings() -> None:
    assert lines_of_code(SOURCE, ast.parse(SOURCE)) == 10


def test_functions_are_measured(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(SOURCE)
    module = read(tmp_path / "m.py", Path("services/models/m.py"))
    assert (module.name, module.lines, module.folder) == ("services.models.m", 21, "services/models")
    assert [(one.name, one.lines, one.typed) for one in module.functions] == [
        ("shown", 5, True),
        ("untyped", 2, False),
    ]


def test_the_core_is_what_servicers_and_trainers_import() -> None:
    house = House()
    assert {"services.engine.engine", "services.models.tango.pipeline"} <= house.serve
    assert {"training.objectives.preference", "training.finetuning.dpo"} <= house.learn
    assert not {"services.cli", "training.promotion.promote"} & (house.serve | house.learn)


def test_circles_are_found_between_the_modules_and_folders_of_one_folder() -> None:
    imports = {
        "p.a.x": {"p.a.y", "p.b"},
        "p.a.y": {"p.a.x"},
        "p.b": {"p.c.z"},
        "p.c.z": {"p.b", "other"},
        "p": {"p.a.x"},
    }
    assert circles_of(siblings("p.a", imports)) == [["x", "y"]]
    assert circles_of(siblings("p", imports)) == [["b", "c"]]
    assert circles_of({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_the_tree_is_read_by_its_indentation() -> None:
    readme = """# It

## The tree

```
README.md  LICENSE
.ci/run          what CI runs
services/
  models/        one folder a family: tango/, clap/
    a/  b/       two
  local.py       the same
docs/            pages,
                 continued here
```
"""
    assert list(tree_paths(readme)) == [
        *("README.md", "LICENSE", ".ci/run", "services", "services/models", "services/models/a"),
        *("services/models/b", "services/local.py", "docs"),
    ]


def test_a_tree_that_is_not_the_repositorys_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services" / "models").mkdir(parents=True)
    (tmp_path / "services" / "models" / "a.py").touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").touch()
    (tmp_path / "README.md").write_text(
        "## The tree\n\n```\nservices/\n  engine/  the engine\nREADME.md\n```\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert House(tmp_path).tree_faults() == [
        "README's tree names services/engine, which is not there",
        "README's tree does not name docs/",
        "README's tree does not name services/models/",
    ]
