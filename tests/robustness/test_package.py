"""The package's public face."""

import subprocess
import sys

import pytest

import robustness


def test_each_public_name_is_its_modules_own() -> None:
    assert len(set(robustness.__all__)) == len(robustness.__all__)
    for module, own in robustness._NAMES.items():
        for name in own:
            assert getattr(robustness, name) is getattr(sys.modules[f"robustness.{module}"], name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(robustness, "nothing")  # noqa: B009


def test_importing_a_module_loads_no_other() -> None:
    code = (
        "import sys, robustness.settings; robustness.WorkerPool;"
        "print(*sorted(m for m in sys.modules if m.startswith('robustness.')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [
        "robustness.instrumentation",
        "robustness.log_context",
        "robustness.memory",
        "robustness.settings",
        "robustness.worker_handle",
        "robustness.worker_pool",
        "robustness.worker_process",
        "robustness.worker_task",
    ]
