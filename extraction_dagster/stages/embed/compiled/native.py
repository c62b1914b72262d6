"""A network that AOTInductor compiled into a shared library, called through the library's C interface.

torch's own binding keeps Python's lock for the whole pass, so that the thread that reads the next frames would stand
still; a call through ctypes does not.

Source:
    `torch/csrc/inductor/aoti_runtime/interface.h`; test_compiled.py holds what is relied on.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING, Any, Final

from extraction_dagster.errors.embed import CompiledNetworkError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

_HANDLE: Final = ctypes.c_void_p
_HANDLES: Final = ctypes.POINTER(ctypes.c_void_p)
_CREATE: Final = "AOTInductorModelContainerCreateWithDevice"
_RUN: Final = "AOTInductorModelContainerRun"
_DELETE: Final = "AOTInductorModelContainerDelete"


class NativeNetwork:
    """Compiled code with its weights.

    The code trusts its input: whoever calls it checks h and w.
    """

    def __init__(self, path: Path) -> None:
        """Load a shared library; from then on its code runs in this process.

        Raises:
            CompiledNetworkError: It can't be loaded.
        """
        container = _HANDLE()
        try:
            library = ctypes.CDLL(str(path))
            create = _typed(library, _CREATE, _HANDLES, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p)
            self._run = _typed(
                library, _RUN, _HANDLE, _HANDLES, ctypes.c_size_t, _HANDLES, ctypes.c_size_t, _HANDLE, _HANDLE
            )
            delete = _typed(library, _DELETE, _HANDLE)
        except (OSError, AttributeError) as error:
            raise CompiledNetworkError(str(path), str(error)) from error
        if create(ctypes.byref(container), 1, b"cpu", None):
            raise CompiledNetworkError(str(path), f"{_CREATE} failed")
        self.path, self._container = str(path), container
        # Not when the process ends: torch may be gone by then.
        weakref.finalize(self, delete, container).atexit = False

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Run a pass: uint8 (N, h, w, 3), contiguous, to float32 (N, dim).

        Raises:
            CompiledNetworkError: It failed; the library has written to stderr why.
        """
        import torch
        from torch._C import _aoti

        # The pass takes over the handle of its input, whatever comes of it, and gives one of its output.
        given = (_HANDLE * 1)(_pointer(_aoti.unsafe_alloc_void_ptr_from_tensor(torch.from_numpy(pixels)), None))
        made = (_HANDLE * 1)()
        if self._run(self._container, given, 1, made, 1, None, None):
            raise CompiledNetworkError(self.path, f"a pass over {pixels.shape} failed")
        vectors: np.ndarray = _aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(made[0], None, None)).numpy()
        return vectors


def _typed(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:  # noqa: ANN401 - ctypes' types share no base
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, ctypes.c_int32
    return function


def _python_function(name: str, result: Any, *arguments: Any) -> Any:  # noqa: ANN401 - as above
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_pointer = _python_function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_capsule = _python_function("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
