"""DeepCache (arXiv 2312.00858): in some steps, the inner blocks of a UNet return what they returned last."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


class DeepFeatures:
    """Keeps what all but the outermost blocks of a UNet return, and returns it again while `reusing`."""

    def __init__(self, unet: Any) -> None:
        inner = (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1])
        self._inner: list[nn.Module] = [block for block in inner if block is not None]
        self._kept: dict[nn.Module, Any] = {}
        self.reusing = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the inner blocks computed, and kept, only while not `reusing`."""
        for block in self._inner:
            block.forward = partial(self._keep, block, block.forward)
        try:
            yield
        finally:
            for block in self._inner:
                del block.forward
            self._kept.clear()

    def _keep(self, block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        if not self.reusing:
            self._kept[block] = forward(*inputs, **options)
        return self._kept[block]
