"""pyarrow as this project uses it."""

import sys
from importlib.abc import MetaPathFinder

import pyarrow as pa


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname == "pandas":
            raise ImportError(fullname)


def leave_out_pandas() -> None:
    """Have pyarrow do without pandas, unless that is imported already.

    To tell values from pandas' pyarrow imports pandas when it converts its first ones, which takes
    half a second. It tries once: later it takes a ``Series`` for any sequence, so this is for
    processes of this project alone. ``to_pandas`` still works.
    """
    sys.meta_path.insert(0, finder := _NoPandas())
    pa.array([0.0])
    sys.meta_path.remove(finder)
