"""What the workers' fork server imports."""

import subprocess
import sys

HEAVY = {"dagster", "duckdb", "pandas", "pydantic", "sqlalchemy", "scipy.signal", "scipy.stats"}


def test_the_fork_server_imports_only_what_workers_need() -> None:
    script = (
        "import sys, pyarrow, robustness.worker_process, audio_assets.extraction.preload\n"
        "pyarrow.Table.from_pylist([{'a': 1.0}])\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    modules = set(output.split())
    assert {"audio_assets.features.rhythm", "essentia.standard", "onnxruntime"} <= modules
    assert not HEAVY & modules


def test_arrow_still_knows_pandas_where_it_is_used() -> None:
    script = (
        "import pyarrow, sys\n"
        "from audio_assets.warehouse.arrow import leave_out_pandas\n"
        "leave_out_pandas()\n"
        "table = pyarrow.Table.from_pylist([{'a': 1.0}, {'a': None}])\n"
        "assert 'pandas' not in sys.modules\n"
        "assert pyarrow.Table.from_pandas(table.to_pandas()) == table"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
