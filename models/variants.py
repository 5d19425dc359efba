"""Register the rows of a table of variants with timm."""

import sys
from collections.abc import Callable, Iterable

from timm.models import register_model
from torch import nn


def register_variants(module: str, names: Iterable[str], build: Callable[..., nn.Module], what: str) -> None:
    """Register each name as timm's decorator does a function of that name in `module`, whose default_cfgs it finds.

    `build(name, pretrained, **kwargs)` makes the model; `what` describes it.
    """
    for name in names:

        def entrypoint(pretrained: bool = False, *, _name: str = name, **kwargs) -> nn.Module:
            return build(_name, pretrained, **kwargs)

        entrypoint.__module__ = module
        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__doc__ = f"{name}: {what}"
        setattr(sys.modules[module], name, register_model(entrypoint))
