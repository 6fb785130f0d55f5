import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from robustness import memory
from robustness.memory import (
    available_memory_mib,
    memory_limit_mib,
    offer_to_oom_killer,
    process_memory_mib,
    worker_budget_mib,
)

MIB = 1024 * 1024


class Machine:
    """A machine of 1000 MiB, 800 of them available, with control groups as files."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroup = root / "cgroup"
        (self.proc / "self").mkdir(parents=True)

    def put_in(self, *lines: str) -> None:
        (self.proc / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def add_group(self, directory: str, files: dict[str, int | str], inactive_mib: int) -> None:
        group = self.cgroup / directory
        group.mkdir(parents=True, exist_ok=True)
        for name, mib in files.items():
            group.joinpath(name).write_text(f"{mib * MIB if isinstance(mib, int) else mib}\n")
        inactive = inactive_mib * MIB
        group.joinpath("memory.stat").write_text(
            f"anon 5\ninactive_file {inactive}\ntotal_inactive_file {inactive}\n"
        )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(memory, "_PROC", made.proc)
    monkeypatch.setattr(memory, "_CGROUP", made.cgroup)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=1000 * MIB, available=800 * MIB)
    )
    return made


def test_without_control_groups_the_machine_is_the_limit(machine: Machine) -> None:
    assert (memory_limit_mib(), available_memory_mib()) == (1000, 800)


def test_cgroup_v2(machine: Machine) -> None:
    machine.put_in("0::/pods/mine")
    machine.add_group("pods/mine", {"memory.max": 400, "memory.current": 300}, inactive_mib=50)
    assert (memory_limit_mib(), available_memory_mib()) == (400, 150)


def test_a_group_further_out_may_have_the_smaller_limit(machine: Machine) -> None:
    machine.put_in("0::/pods/mine")
    machine.add_group("pods/mine", {"memory.max": "max", "memory.current": 100}, inactive_mib=0)
    machine.add_group("pods", {"memory.max": 500, "memory.current": 450}, inactive_mib=10)
    assert (memory_limit_mib(), available_memory_mib()) == (500, 60)


def test_cgroup_v1_beside_v2(machine: Machine) -> None:
    machine.put_in("9:name=systemd:/", "4:cpu,memory:/mine", "0::/")
    files: dict[str, int | str] = {"memory.limit_in_bytes": 600, "memory.usage_in_bytes": 700}
    machine.add_group("memory/mine", files, inactive_mib=0)
    assert (memory_limit_mib(), available_memory_mib()) == (600, 0)


def test_cgroup_v1_without_limit_is_larger_than_any_machine(machine: Machine) -> None:
    machine.put_in("4:memory:/")
    files: dict[str, int | str] = {
        "memory.limit_in_bytes": "9223372036854771712",
        "memory.usage_in_bytes": 300,
    }
    machine.add_group("memory", files, inactive_mib=0)
    assert (memory_limit_mib(), available_memory_mib()) == (1000, 800)


def test_a_group_outside_what_is_mounted_is_passed_over(machine: Machine) -> None:
    machine.put_in("0::/../other")
    assert (memory_limit_mib(), available_memory_mib()) == (1000, 800)


def test_workers_share_the_limit(machine: Machine) -> None:
    assert worker_budget_mib(4) == pytest.approx(200)


def test_the_real_machine_has_memory() -> None:
    assert 0 < available_memory_mib() <= memory_limit_mib()


def test_process_memory_grows_with_what_is_held() -> None:
    before = process_memory_mib(os.getpid())
    held = b"x" * (64 * MIB)
    after = process_memory_mib(os.getpid())
    assert before is not None
    assert after is not None
    assert 60 < after - before < 100
    del held


def test_a_process_that_is_not_there_has_no_memory() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert process_memory_mib(ended.pid) == 0
    ended.wait()
    assert process_memory_mib(ended.pid) is None


def test_a_process_can_offer_itself_to_the_oom_killer() -> None:
    code = (
        "from robustness.memory import offer_to_oom_killer; offer_to_oom_killer();"
        "print(open('/proc/self/oom_score_adj').read())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.check_output([sys.executable, "-c", code], env=environment)
    assert int(output) == 1000


def test_the_offer_is_left_out_where_proc_is_closed(machine: Machine) -> None:
    offer_to_oom_killer()
