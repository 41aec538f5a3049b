"""Generate the Python stubs of protos/milonga: messages, services and their types.

    python protos/generate.py [--force]

The stubs are written next to the .proto files and are not committed. Does nothing where they are up to date.
The wheel's build hook (hatch_build.py) calls `generate` too.
"""

import argparse
import hashlib
import importlib.metadata
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
STAMP = ".generated"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
TOOLS = ("grpcio-tools", "mypy-protobuf")


def proto_files(root: Path = ROOT) -> tuple[Path, ...]:
    """Every .proto under `root`, relative to it, sorted."""
    return tuple(sorted(path.relative_to(root) for path in root.glob("milonga/**/*.proto")))


def stub_files(root: Path = ROOT) -> tuple[Path, ...]:
    """Every stub that `generate` writes, relative to `root`."""
    return tuple(proto.with_name(proto.stem + suffix) for proto in proto_files(root) for suffix in SUFFIXES)


def fingerprint(root: Path = ROOT) -> str:
    """Digest of all that the stubs depend on: the protos, the tools and this program."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for tool in TOOLS:
        digest.update(f"{tool}={importlib.metadata.version(tool)}\n".encode())
    for proto in proto_files(root):
        digest.update(f"{proto.as_posix()}\n".encode())
        digest.update((root / proto).read_bytes())
    return digest.hexdigest()


def is_up_to_date(root: Path = ROOT) -> bool:
    """Whether every stub is there and was made of these protos by these tools."""
    stamp = root / STAMP
    return (
        stamp.is_file()
        and stamp.read_text(encoding="utf-8") == fingerprint(root)
        and all((root / stub).is_file() for stub in stub_files(root))
    )


def generate(root: Path = ROOT, *, force: bool = False) -> bool:
    """Write the stubs of every proto under `root`. Returns whether anything had to be done.

    Stubs are made in a folder aside and then renamed into place, so that a reader never sees half a file and
    a fault in a proto leaves the old stubs alone.
    """
    if not force and is_up_to_date(root):
        return False
    with tempfile.TemporaryDirectory(prefix=".stubs-", dir=root) as folder:
        made = Path(folder)
        _run_protoc(root, made, proto_files(root))
        for stub in stub_files(root):
            (made / stub).replace(root / stub)
        stamp = made / STAMP
        stamp.write_text(fingerprint(root), encoding="utf-8")
        stamp.replace(root / STAMP)
    return True


def _run_protoc(root: Path, out: Path, protos: Iterable[Path]) -> None:
    import grpc_tools
    from grpc_tools import protoc

    status = protoc.main(
        [
            "protoc",
            f"--proto_path={root}",
            f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
            f"--plugin=protoc-gen-mypy={_plugin('protoc-gen-mypy')}",
            f"--plugin=protoc-gen-mypy_grpc={_plugin('protoc-gen-mypy_grpc')}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *(str(proto) for proto in protos),
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}; its message is above")


def _plugin(name: str) -> str:
    """Path of a protoc plugin: of this Python's environment first, activated or not."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"{name} is missing; pip install 'mypy-protobuf>=5,<6'")
    return found


def main() -> int:
    """Entry point of ``python protos/generate.py``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--force", action="store_true", help="generate even where the stubs are up to date")
    done = generate(force=parser.parse_args().force)
    state = "generated" if done else "up to date"
    print(f"protos: {state}, {len(stub_files())} stubs of {len(proto_files())} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
