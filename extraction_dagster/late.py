"""A library that is imported once it is first used: `from extraction_dagster.late import np`.

For the files that say what settings mean and do the work as well: definitions and commands need the former alone, and
numpy is a fifth of a CPU second that many of them would pay for nothing.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["np"]

if TYPE_CHECKING:
    import numpy as np
else:

    class _Late(ModuleType):
        """Stands for a module until a name of it is asked for; from then on it holds all of them."""

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the module holds
            module = importlib.import_module(self.__name__)
            self.__dict__.update(vars(module))
            return getattr(module, name)

    np = _Late("numpy")
