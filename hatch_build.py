"""Hatchling's build hook: the wheel (and an editable install) carries the generated gRPC stubs.

The wheel alone also carries copies of files that lie elsewhere in the repository, as pyproject.toml says.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _generator(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("milonga_protos_generate", root / "protos" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class StubsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Generates the stubs before the wheel's files are collected, and has them and the copies collected.

    They are ignored by git, so hatchling would leave them out unless they are named as artifacts.
    """

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before each build; `version` is ``standard`` or ``editable``."""
        if self.target_name != "wheel":
            return
        generator = _generator(Path(self.root))
        generator.generate()
        build_data["artifacts"].extend(f"/protos/{stub.as_posix()}" for stub in generator.stub_files())
        if version == "standard":
            build_data["force_include"].update(self.config["force-include"])
