"""What the project costs beside its extractors alone, Essentia, others and plain Dagster.

python -m benchmarks.speed [--quick] [--minutes M] [--tiny-files N ...] [--results DIRECTORY]
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from audio_assets.audio.decode import decode
from audio_assets.audio.pcm import Audio
from audio_assets.features import FEATURE_SETS
from audio_assets.settings import AudioAssetsSettings
from benchmarks.corpus import (
    FULL_RATE,
    find_source,
    make_library,
    make_tiny_library,
)
from benchmarks.measure import (
    PROJECT,
    clean_environment,
    machine,
    run_tree,
    write_results,
)
from benchmarks.report import CONTESTANTS
from benchmarks.speed_systems import CANNED, FEATURE_SETS_WANTED, PEERS, REPORT

QUICK_SETS = ("metadata", "rhythm")
TINY_SETS = ("key", "loudness")
"""Feature sets of the runs that count orchestration alone."""

PARTS = ("compare", "samples", "orchestration", "layer")
REPEATS = 5
"""Runs of a library of one or two batches, whose start varies by as much as a batch takes."""

BATCH_FILES = AudioAssetsSettings.model_fields["batch_size"].default

TRACK_S = 200.0
SAMPLES = 5000
WITHOUT_FILES = 18
PLAIN_FILES = 2
"""Tracks, of those for all feature sets, that are enough without MusiCNN and for plain Dagster."""


def run_system(
    system: str,
    library: Path,
    feature_sets: Sequence[str],
    directory: Path,
    extra: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a system on a library in a home of its own, and return its figures."""
    directory.mkdir(parents=True)
    home = directory / "home"
    home.mkdir()
    shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", home)
    report = directory / "report.json"
    log = directory / "run.log"
    usage = run_tree(
        [sys.executable, "-m", "benchmarks.speed_systems", system, str(library)],
        clean_environment(
            DAGSTER_HOME=str(home),
            **{REPORT: str(report), FEATURE_SETS_WANTED: ",".join(feature_sets)},
            **(extra or {}),
        ),
        log=log,
    )
    if usage.returncode or not report.exists():
        raise SystemExit(f"{system} failed:\n{log.read_text()[-4000:]}")
    reported = json.loads(report.read_text())
    if reported.get("cells_missing"):
        raise SystemExit(f"{system} left out {reported['cells_missing']} cells")
    figures = {name: value for name, value in asdict(usage).items() if name != "peak_mib"}
    shutil.rmtree(home)
    return figures | reported


def compare(
    scratch: Path,
    feature_sets: Sequence[str],
    *,
    minutes: float,
    seconds: float,
    plain_files: int,
) -> dict[str, Any]:
    """Compare the systems on tracks of usual length, with and without MusiCNN."""
    count = max(round(minutes * 60 / seconds), 2)
    found: dict[str, Any] = {"files": count, "seconds_per_file": seconds, "ratios": {}}
    without = [name for name in feature_sets if name != "musicnn"]
    few = min(count, WITHOUT_FILES)
    source = find_source(scratch, FULL_RATE)
    tracks = make_library(source, scratch / "tracks", files=count, seconds=seconds, seed=1)
    peers = [system for system, module in PEERS.items() if find_spec(module)]
    without_systems = ["bare", "project", "algorithms", *peers, "plain"]
    for name, sets, files, systems in (
        ("with_musicnn", feature_sets, tracks, ["bare", "project", "plain"]),
        ("without_musicnn", without, tracks[:few], without_systems),
    ):
        if name == "with_musicnn" and "musicnn" not in feature_sets:
            continue
        found[name] = {"source": source.about()}
        for system in systems:
            some = files[:plain_files] if system == "plain" else files
            library = scratch / name / f"{system}-music"
            library.mkdir(parents=True)
            for path in some:
                (library / path.name).hardlink_to(path)
            figures = run_system(system, library, sets, scratch / name / system)
            found[name][system] = _per_second(figures, len(some) * seconds)
            _tell(found[name][system], f"{source.sampling}, {name}", system)
        title = "without MusiCNN" if sets is without else "all feature sets"
        found["ratios"] |= _ratios(found[name], f"{source.sampling}, {title}")
    return found


def samples(scratch: Path, feature_sets: Sequence[str], files: int) -> dict[str, Any]:
    """Compare the project with a process pool on files of a second, without MusiCNN."""
    source = find_source(scratch, FULL_RATE)
    library = scratch / "samples"
    make_library(source, library, files=files, seconds=1.0, seed=2)
    sets = [name for name in feature_sets if name != "musicnn"]
    found: dict[str, Any] = {"files": files, "source": source.about()}
    for system in ("bare", "project"):
        figures = run_system(system, library, sets, scratch / f"samples of {system}")
        found[system] = _per_second(figures, files)
        _tell(found[system], "samples of a second", system)
    return found


def _per_second(figures: dict[str, Any], audio_s: float) -> dict[str, Any]:
    return figures | {
        "audio_s": audio_s,
        "audio_s_per_s": audio_s / figures["wall_s"],
        "cpu_s_per_audio_s": figures["cpu_s"] / audio_s,
    }


def _ratios(systems: Mapping[str, Any], which: str) -> dict[str, float]:
    """Return the ratios of systems that ran on the same audio; every name says which."""
    project, bare = systems["project"], systems["bare"]
    ratios = {
        "project over bare, CPU": project["cpu_s"] / bare["cpu_s"],
        "project over bare, CPU, without start-up": (project["cpu_s"] - project["startup_cpu_s"])
        / bare["cpu_s"],
        "project over bare, wall": project["wall_s"] / bare["wall_s"],
    }
    for system in ("algorithms", *PEERS):
        if system not in systems:
            continue
        peer, label = systems[system], CONTESTANTS[system]
        ratios[f"{label} over project, CPU"] = peer["cpu_s"] / project["cpu_s"]
        ratios[f"{label} over project, wall"] = peer["wall_s"] / project["wall_s"]
    if plain := systems.get("plain"):
        ratios["plain over project, wall"] = project["audio_s_per_s"] / plain["audio_s_per_s"]
    return {f"{which}: {name}": value for name, value in ratios.items()}


def _tell(figures: Mapping[str, Any], which: str, system: str) -> None:
    print(
        f"{which:44} {system:9} {figures['audio_s_per_s']:7.1f} s of audio per s, "
        f"{figures['cpu_s_per_audio_s'] * 1000:6.1f} ms CPU per s of audio",
        flush=True,
    )


def orchestration(scratch: Path, sizes: Sequence[int], *, quick: bool) -> list[dict[str, Any]]:
    """Measure what a file costs when analysing it costs nothing, by the size of the library.

    What a library of one batch takes is taken off: so are start-up and the first batch, and what
    is left is that of whole batches.
    """
    scratch.mkdir()
    (example,) = make_tiny_library(scratch / "example", 1)
    decode(example, scratch / "example.npy")
    audio = Audio.open(scratch / "example.npy", example)
    canned = scratch / "canned.json"
    canned.write_text(json.dumps({name: FEATURE_SETS[name].extract(audio) for name in TINY_SETS}))
    results = []
    base: dict[str, Any] = {}
    first = 1 if quick else BATCH_FILES
    for size in (first, *sizes):
        library = scratch / f"tiny {size}"
        make_tiny_library(library, size)
        runs = [
            run_system(
                "project",
                library,
                TINY_SETS,
                scratch / f"run {size} {number}",
                {CANNED: str(canned)},
            )
            for number in range(REPEATS if size <= 2 * BATCH_FILES and not quick else 1)
        ]
        figures = sorted(runs, key=lambda run: run["cpu_s"])[len(runs) // 2]
        shutil.rmtree(library)
        if not base:
            base = figures
            continue
        cells = (size - first) * len(TINY_SETS)
        own = {kind: figures[f"{kind}_s"] - base[f"{kind}_s"] for kind in ("wall", "cpu")}
        results.append(
            figures
            | {
                "files": size,
                "feature_sets": len(TINY_SETS),
                "first_batch": first,
                "first_batch_wall_s": base["wall_s"],
                "first_batch_cpu_s": base["cpu_s"],
                "wall_ms_per_file": own["wall"] / (size - first) * 1000,
                "cpu_ms_per_file": own["cpu"] / (size - first) * 1000,
                "wall_ms_per_cell": own["wall"] / cells * 1000,
            }
        )
        print(
            f"{size} files: {results[-1]['wall_ms_per_file']:.1f} ms wall and "
            f"{results[-1]['cpu_ms_per_file']:.1f} ms CPU per file",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds of audio, 3 tiny files")
    parser.add_argument("--minutes", type=float, default=40.0, help="minutes of audio")
    parser.add_argument(
        "--tiny-files", type=int, nargs="*", default=[100, 1000], help="sizes of tiny libraries"
    )
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=PARTS,
        default=PARTS,
        help="what to measure; what is left out stays as it was in the results",
    )
    parser.add_argument("--results", type=Path, help="directory for speed.json")
    arguments = parser.parse_args()
    sizes = [3] if arguments.quick else arguments.tiny_files
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in arguments.parts:
            about = {"machine": machine(), "quick": arguments.quick}
            match part:
                case "compare":
                    found: Any = (
                        compare(
                            scratch,
                            QUICK_SETS,
                            minutes=0.1,
                            seconds=3.0,
                            plain_files=1,
                        )
                        if arguments.quick
                        else compare(
                            scratch,
                            list(FEATURE_SETS),
                            minutes=arguments.minutes,
                            seconds=TRACK_S,
                            plain_files=PLAIN_FILES,
                        )
                    )
                case "samples":
                    found = samples(
                        scratch / "seconds",
                        QUICK_SETS if arguments.quick else list(FEATURE_SETS),
                        4 if arguments.quick else SAMPLES,
                    )
                case "orchestration":
                    found = {"runs": orchestration(scratch / "tiny", sizes, quick=arguments.quick)}
                case _:
                    from benchmarks import layer  # pybreaker is in the dependency group bench

                    found = layer.measure(scratch / "layer", quick=arguments.quick)
            print(write_results(f"speed-{part}", about | found, arguments.results))


if __name__ == "__main__":
    main()
