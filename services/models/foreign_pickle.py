"""Read the tensors of a pickled checkpoint that also holds objects of libraries which are not installed.

`torch.load` with ``weights_only`` refuses such a file whole. Here objects of all classes but tensors and
plain containers become `Foreign`, which keeps nothing: no code of the file runs, none of its libraries is
imported, and no attribute of anything outside the file can be set.
"""

import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from services.errors import ModelFormatError
from services.models.folders import describe_weights, one_line


class Foreign:
    """Stands for an object of an unknown class. It accepts what a pickle does to objects, and ignores it."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> "Foreign":
        """Accept any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "Foreign":
        """Return itself."""
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Ignore an element."""

    def extend(self, _: Any) -> None:
        """Ignore elements."""

    def add(self, _: Any) -> None:
        """Ignore an element."""


class _Call:
    """A function that a pickle may call; its attributes can't be set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("the state of a function")


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return a tensor without gradients and hooks."""
    tensor: Tensor = torch._utils._rebuild_tensor(storage, offset, size, stride)  # type: ignore[no-untyped-call]
    return tensor


_KNOWN: Final[Mapping[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda tensor, *_: tensor),
}
"""Globals of a pickle that are used. torch itself finds the types of storages."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), Foreign)


def _load(file: io.BufferedIOBase, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_MODULE: Final = SimpleNamespace(__name__="foreign", Unpickler=_Unpickler, load=_load)
"""What `torch.load` needs of a pickle module."""


def read_foreign_pickle(path: Path) -> Any:
    """Return the content of a PyTorch checkpoint on the CPU, memory-mapped if its format allows it.

    Raises `ModelFormatError` if it is none.
    """
    if found := describe_weights(path):
        raise ModelFormatError(f"{path} is {found}")
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise ModelFormatError(f"{path} is a TorchScript program; give a checkpoint of tensors")
        if not zipped and tarfile.is_tarfile(path):
            raise ModelFormatError(f"{path} is an archive; unpack it, and give the file in it")
        return torch.load(path, map_location="cpu", pickle_module=_MODULE, weights_only=False, mmap=zipped)
    except ModelFormatError:
        raise
    except Exception as error:  # torch raises errors of many kinds for damaged and hostile files
        raise ModelFormatError(
            f"{path} is truncated or no PyTorch checkpoint ({one_line(error)}); fetch it again"
        ) from error
