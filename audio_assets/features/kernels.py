"""Inner loops over samples and bins, compiled to machine code by Numba.

They are compiled as this module is imported, which takes seconds once, and kept beside it or in the
user's cache directory. To import Numba takes time, too: this module is imported where a kernel is
called, and by the workers' fork server.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def _compiled(signature: str) -> Callable[[Kernel], Kernel]:
    """Compile a function for arguments of these types.

    Sums may be added up in another order. Kernels do not call one another: processes that compile
    such ones at once can leave code that crashes (github.com/numba/numba/issues/4807).
    """

    def compile_now(function: Kernel) -> Kernel:
        options: dict[str, Any] = {
            "nogil": True,
            "error_model": "numpy",
            "fastmath": {"arcp", "contract", "nsz", "reassoc"},
        }
        try:
            kernel = njit(signature, cache=True, **options)(function)
        except RuntimeError:  # no directory to keep it in can be written
            kernel = njit(signature, **options)(function)
        return cast("Kernel", kernel)

    return compile_now
