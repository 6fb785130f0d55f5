"""Makes docs/benchmarks.md and its plots from the results.

python -m benchmarks.report [--results DIRECTORY] [--docs DIRECTORY]
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from audio_assets.features.tempo import is_same
from benchmarks.corpus import Sampling
from benchmarks.measure import PROJECT, RESULTS

SYSTEMS = {"plain": "plain Dagster", "fixed": "fixed settings", "product": "this project"}
CONTESTANTS = {
    "project": "this project",
    "bare": "its extractors alone",
    "algorithms": "Essentia's algorithms",
    "essentia": "MusicExtractor",
    "mixxx": "mixxx-analyzer",
    "sonara": "sonara",
    "bliss": "bliss-audio",
    "plain": "plain Dagster, a run per file",
}
_WITH_PARTS = ("project", "bare", "algorithms")
COMPARISONS = {
    "with_musicnn": "all feature sets",
    "without_musicnn": "without MusiCNN",
}
_INK, _ACCENT = "#8a8f98", "#2f6fb2"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figure(value: float | None, unit: str = "", digits: int = 1) -> str:
    """Return a number for reading."""
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def about(results: Mapping[str, Any]) -> str:
    """Return the machine and the versions of a run."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    quick = " A quick run: its figures mean nothing." if results["quick"] else ""
    return (
        f"{machine['at'][:10]}, {machine['usable_cores']} cores ({machine['cpu']}, load "
        f"{machine['load_at_start']:g} at the start), {machine['memory_gib']:g} GiB, "
        f"Python {machine['python']}, {versions}.{quick}"
    )


def audio(source: Mapping[str, Any] | str) -> tuple[str, str]:
    """Return the sample rate and channels of a source, and where it is from.

    Results that name no sample rate were made with any.
    """
    if isinstance(source, str) or source["sample_rate"] is None:
        kind = source if isinstance(source, str) else source["kind"]
        return "mixed sample rates and channels", kind
    return str(Sampling(source["sample_rate"], source["channels"])), source["kind"]


def comparisons(results: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return each comparison's title, the source of its audio, and its figures."""
    found = []
    for name, title in COMPARISONS.items():
        if systems := results.get(name):
            sampling, kind = audio(systems.get("source") or results["source"])
            found.append((f"{sampling}, {title}", kind, systems))
    return found


def incidents(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the table of what hit the whole project."""
    labels = {
        "power_cut": "power cut: every process killed, the command started again",
        "full_disk": "disk full for 30 s, then freed",
    }
    rows = [
        (
            labels[name],
            f"{incident['cells_had']} of {incident['cells_possible']}",
            figure(incident["recovery_s"], " s"),
            figure(incident["wall_s"], " s", 0),
            incident.get("computed_twice", "-"),
        )
        for name, incident in found.items()
    ]
    header = ("", "cells computed", "next good cell after", "wall time from then", "computed twice")
    return [table(header, rows)] if rows else []


def faults_section(results: Mapping[str, Any]) -> str:
    """Return the section on faults."""
    systems = results["systems"]
    calm = systems["product_without_faults"]
    rows = [
        (
            label,
            f"{100 * s['success_rate']:.1f} % ({s['cells_had']} of {s['cells_possible']})",
            s["cells_given_up"],
            s["cells_not_reached"],
            s["honest_cells_killed"],
            s["wrong_retries"],
            figure(s["wall_s"], " s", 0),
            figure(s["recovery_p50_s"], " s"),
            figure(s["recovery_p95_s"], " s"),
            figure(s["worker_peak_mib"], " MiB", 0),
        )
        for name, label in SYSTEMS.items()
        if (s := systems.get(name))
    ]
    header = ("", "cells computed", "failed", "never tried", "killed wrongly", "useless retries")
    header += ("wall time", "recovered in p50", "recovered in p95", "peak of a worker")
    lost = [
        (label, ", ".join(f"{kind}: {n}" for kind, n in sorted(systems[name]["lost"].items())))
        for name, label in SYSTEMS.items()
        if name in systems
    ]
    product = systems["product"]
    checks = [
        ("possible cells computed", "≥ 99.5 %", f"{100 * product['success_rate']:.1f} %"),
        ("attempts killed wrongly", "0", product["honest_cells_killed"]),
        (
            "wall time, with over without faults",
            "≤ 1.5",
            f"{product['wall_s'] / calm['wall_s']:.2f}",
        ),
        (
            "peak of a worker over its memory budget",
            "≤ 1.25",
            f"{product['worker_peak_mib'] / results['worker_memory_mib']:.2f}",
        ),
    ]
    if product["recovery_p95_s"] and "fixed" in systems:
        ratio = systems["fixed"]["recovery_p95_s"] / product["recovery_p95_s"]
        checks.insert(
            2, ("recovered in p95, fixed settings over this project", "≥ 10", f"{ratio:.1f}")
        )
    library = results["library"]
    return "\n\n".join(
        [
            "## Faults",
            f"`make bench-faults`: {library['files']} files, {len(library['damaged'])} of them "
            f"damaged, the others {library['seconds_per_file']:g} s long. {about(results)} "
            "Audio: {}, from {}.".format(*audio(results["source"])),
            table(header, rows),
            f"Without faults the project takes {calm['wall_s']:.0f} s for this library.",
            "![Cells computed over time](images/benchmark-faults.svg)",
            *incidents(results.get("incidents", {})),
            "Cells lost, by the fault that hit them:",
            table(("", "cells lost"), [(label, kinds or "nothing") for label, kinds in lost]),
            table(("target", "wanted", "found"), checks),
        ]
    )


def damage_section(results: Mapping[str, Any]) -> str:
    """Return the section on damaged files."""
    loop, product = results["systems"]["essentia_loop"], results["systems"]["product"]
    rows = [
        (damage, loop["cells_had_by_damage"][damage], had)
        for damage, had in product["cells_had_by_damage"].items()
    ]
    rows += [
        ("all", *(f"{s['cells_had']} of {s['cells_possible']}" for s in (loop, product))),
        ("audio decoded", *(figure(s["seconds"] / 60, " min") for s in (loop, product))),
        ("crashes and hangs", loop["crashes_or_hangs"], product["crashes_or_hangs"]),
    ]
    return "\n\n".join(
        [
            "## Damaged files",
            f"`python -m benchmarks.damage`: {results['files']} files of "
            f"{results['seconds_per_file']:g} s before their damage, cells computed of each.",
            table(("", "Essentia in a loop", "this project"), rows),
            "Without a cell in this project: "
            + (", ".join(product["without_a_cell"]) or "no file")
            + ".",
        ]
    )


_PROGRAMS = {
    "primary": "this project",
    "alternative": "its alternatives",
    "mixxx-analyzer": "mixxx-analyzer",
    "sonara": "sonara",
    "bliss-audio": "bliss-audio",
}
_SCORES = {
    "tempo": "tempo within 4 %",
    "tempo_or_second": "… or the second candidate is",
    "tempo_any_octave": "… or a multiple or fraction of it is",
    "confidence_brier": "confidence of the tempo: Brier score",
    "confidence_calibration_error": "… expected calibration error",
    "confidence_auc": "… area under the ROC curve",
    "beat_f_measure": "beats: F-measure",
    "beat_cmlt": "beats: CMLt",
    "beat_amlt": "beats: AMLt",
    "key_score": "key: weighted score",
    "tuning_error_cents": "tuning: median error (cents)",
}


def _programs(by_program: Mapping[str, Any]) -> list[str]:
    return [name for name in _PROGRAMS if name in by_program]


def _by_tempo(tempi: Mapping[str, Any], names: Sequence[str]) -> Iterator[Sequence[object]]:
    """Yield the share of right tempi in each range of true ones."""
    for low, high in pairwise((30, 80, 110, 140, 170, 240)):
        rights = [
            [found is not None and is_same(found, truth) for truth, found in tempi[name]
             if truth and low <= truth < high]
            for name in names
        ]  # fmt: skip
        if rights[0]:
            shares = (figure(sum(right) / len(right), digits=2) for right in rights)
            yield f"{low} to {high} bpm", len(rights[0]), *shares


def _number_last(signal: str) -> tuple[str, int]:
    name, number = signal.rsplit(maxsplit=1)
    return name, int(number)


def accuracy_section(results: Mapping[str, Any]) -> str:
    """Return the section on values against a known truth."""
    parts = ["## Accuracy", f"`make bench-accuracy`. {about(results)}"]
    for collection, found in results["collections"].items():
        names = _programs(found["scores"])
        rows = [
            (label, *(figure(found["scores"][name][score], digits=2) for name in names))
            for score, label in _SCORES.items()
        ]
        header = (f"{collection}, {found['files']} files", *(_PROGRAMS[name] for name in names))
        parts.append(table(header, rows))
        rows = [
            (kind, of_kind["files"], *(figure(of_kind["tempo"][name], digits=2) for name in names))
            for kind, of_kind in sorted(
                found["kinds"].items(), key=lambda item: item[1]["tempo"]["primary"]
            )
        ]
        if rows:
            header = ("tempo within 4 %, worst first", "files", *(_PROGRAMS[n] for n in names))
            parts.append(table(header, rows))
        if rows := list(_by_tempo(found["tempi"], names)):
            header = ("tempo within 4 %, by true tempo", "files", *(_PROGRAMS[n] for n in names))
            parts.append(table(header, rows))
    parts.append("![Tempo found against the truth](images/benchmark-accuracy.svg)")
    if errors := results.get("loudness_errors"):
        names = _programs(errors)
        rows = [
            (signal, *(figure(errors[name][signal], digits=2) for name in names))
            for signal in sorted(errors["primary"], key=_number_last)
        ]
        header = ("error of the EBU's test signals (LU or dB)", *(_PROGRAMS[n] for n in names))
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def confidence_section(results: Mapping[str, Any]) -> str:
    """Return the section on the probabilities that tempi are right."""
    scores = results["scores"]
    rows = [
        (
            kind["kind"],
            kind["sounds"],
            figure(100 * kind["right"] / kind["sounds"], " %", 0),
            figure(100 * kind["confidence"], " %", 0),
            figure(100 * kind["second_right"] / kind["sounds"], " %", 0),
        )
        for kind in results["kinds"]
    ]
    header = ("", "sounds", "`bpm` is right", "mean `bpm_confidence`", "`bpm_second` is right")
    return "\n\n".join(
        [
            "## Confidence of tempi",
            f"`python -m benchmarks.tempo_calibration`. {about(results)}",
            "`bpm_confidence` is calibrated on **synthesized sounds only**, since no annotated "
            f"recordings were at hand: on {results['sounds']}, many of them hard on purpose. They "
            "have two parts, of different drum patterns and instruments; each was scored by "
            "constants fitted to the other: "
            f"Brier score {figure(scores['brier'], digits=3)}, expected calibration error "
            f"{figure(scores['calibration_error'], digits=3)}, area under the ROC curve "
            f"{figure(scores['auc'], digits=3)}. Their tempi are mostly between 80 and 160; where "
            "slower and faster ones are as frequent, as among the pieces above, tempi of half or "
            "twice the true one are too, and the probabilities are too high.",
            table(header, rows),
            "![Share of right tempi by confidence](images/benchmark-confidence.svg)",
        ]
    )


def compare_section(results: Mapping[str, Any]) -> str:
    """Return the section on speed beside others."""
    minutes = results["files"] * results["seconds_per_file"] / 60
    parts = [
        "## Speed",
        f"`python -m benchmarks.speed --minutes {minutes:.0f}`: {results['files']} tracks of "
        f"{results['seconds_per_file']:g} s, fewer where a table says so. {about(results)}",
    ]
    for what, kind, systems in comparisons(results):
        rows = [
            (
                label,
                figure(s["audio_s"] / 60, " min"),
                figure(s["audio_s_per_s"]),
                figure(s["cpu_s_per_audio_s"] * 1000, " ms"),
                figure(s["wall_s"], " s"),
            )
            for system, label in CONTESTANTS.items()
            if (s := systems.get(system))
        ]
        header = (
            what,
            "audio",
            "seconds of audio per second",
            "CPU per second of audio",
            "wall time",
        )
        parts += [f"Audio: {what.partition(', ')[0]}, from {kind}.", table(header, rows)]
    parts.append("![CPU time per second of audio](images/benchmark-speed.svg)")
    rows = [(name, f"{ratio:.2f}") for name, ratio in results["ratios"].items()]
    parts.append(table(("ratio", "found"), rows))
    what, _, systems = comparisons(results)[-1]
    project = systems["project"]
    parts.append(f"CPU time per second of audio by part, {what}:")
    shown = {label: systems[n] for n, label in CONTESTANTS.items() if n in _WITH_PARTS}
    rows = [
        (part, *(_per_audio(system, system["parts_cpu_s"].get(part)) for system in shown.values()))
        for part in project["parts_cpu_s"]
    ]
    rows += [
        (f"main process: {name}", _per_audio(project, seconds), "", "")
        for name, seconds in _main_parts(project)
    ]
    workers = project["cpu_s"] - project["main_cpu_s"] - sum(project["parts_cpu_s"].values())
    rows.append(("workers' start, identifying files, IPC", _per_audio(project, workers), "", ""))
    parts.append(table(("", *shown), rows))
    return "\n\n".join(parts)


def samples_section(results: Mapping[str, Any]) -> str:
    """Return the section on files of a second."""
    sampling, kind = audio(results["source"])
    project, bare = results["project"], results["bare"]
    rows = [
        (
            CONTESTANTS[name],
            figure(results["files"] / system["wall_s"]),
            figure(system["cpu_s"] / results["files"] * 1000, " ms"),
            figure(system["wall_s"], " s", 0),
        )
        for name, system in (("project", project), ("bare", bare))
    ]
    rows.append(
        (
            "project over bare",
            "",
            figure(project["cpu_s"] / bare["cpu_s"]),
            figure(project["wall_s"] / bare["wall_s"]),
        )
    )
    return "\n\n".join(
        [
            "## Samples of a second",
            f"`python -m benchmarks.speed --parts samples`: {results['files']:,} files, without "
            f"MusiCNN, beside a process pool that keeps nothing. {about(results)} Audio: "
            f"{sampling}, from {kind}.",
            table(("", "files per second", "CPU per file", "wall time"), rows),
            "From the last attempt of a batch to the first of the next, "
            f"{median(project['gaps_s']):.1f} s pass (median), in which no worker works.",
        ]
    )


def _per_audio(system: Mapping[str, Any], seconds: float | None) -> str:
    return figure(seconds and 1000 * seconds / system["audio_s"], " ms", 2)


def _main_parts(project: Mapping[str, Any]) -> list[tuple[str, float]]:
    known = {"start-up": project["startup_cpu_s"], **project["main_parts_cpu_s"]}
    known["anything else"] = project["main_cpu_s"] - sum(known.values())
    return sorted(known.items(), key=lambda item: -item[1])


_ONCE = ("start-up", "Dagster and the rest of a run", "anything else")
"""Parts whose time is mostly spent once."""


def orchestration_section(results: Mapping[str, Any]) -> str:
    """Return the section on the cost per file."""
    rows = [
        (
            f"{run['files']:,}",
            figure(run["wall_ms_per_file"], " ms"),
            figure(run["cpu_ms_per_file"], " ms"),
            figure(run["wall_s"], " s"),
        )
        for run in results["runs"]
    ]
    runs = results["runs"]
    parts = [name for name, _ in _main_parts(runs[-1]) if name not in _ONCE]
    by_part = {
        name: [run["main_parts_cpu_s"].get(name, 0.0) / run["files"] * 1000 for run in runs]
        for name in parts
    }
    by_part["all of these"] = [sum(column) for column in zip(*by_part.values(), strict=True)]
    return "\n\n".join(
        [
            "## Cost per file without analysis",
            f"With {runs[-1]['feature_sets']} feature sets that return at once, so that only the "
            f"project's own work counts, without start-up and first batch. {about(results)} "
            "Audio: 8 kHz mono tones of 50 ms, which nothing analyses.",
            table(("files", "wall time per file", "CPU per file", "whole run"), rows),
            "![Cost per file](images/benchmark-orchestration.svg)",
            "CPU time of the main process per file, without start-up:",
            table(
                ("", *(f"{run['files']:,} files" for run in runs)),
                [(name, *(figure(ms, " ms", 2) for ms in row)) for name, row in by_part.items()],
            ),
        ]
    )


def layer_section(results: Mapping[str, Any]) -> str:
    """Return the section on the robustness layer."""
    costs = results["microseconds"]
    columns = ("in-process", "shared (SQLite)", "pybreaker", "tenacity")
    rows = [(name, *(figure(by.get(column)) for column in columns)) for name, by in costs.items()]
    return "\n\n".join(
        [
            "## Cost of the robustness layer",
            f"Microseconds per operation, median of five rounds. {about(results)}",
            table(("", *columns), rows),
        ]
    )


def drift_section(results: Mapping[str, Any]) -> str:
    """Return the section on what got slower."""
    quiet, needed = results["quiet_evidence"], results["evidence_needed"]
    more = f"{100 * (results['slowdown'] - 1):.0f} %"
    after = results["found_after_cells"]
    names = sorted({name for run in quiet for name in run})
    rows = [
        (
            name,
            figure(max(run.get(name, 0.0) for run in quiet)),
            sum(run.get(name, 0.0) >= needed for run in quiet),
            after.get(name, "-"),
        )
        for name in names
    ]
    header = (
        "",
        "most evidence in an unchanged run",
        "unchanged runs that raised it",
        f"cells until a slowdown of {more} was found",
    )
    sampling, kind = audio(results["source"])
    return "\n\n".join(
        [
            "## What got slower",
            f"`python -m benchmarks.drift`: {len(quiet)} unchanged runs of {results['files']} "
            f"files, then runs in which every extractor computes {more} longer; "
            f"decoding is not slowed. It is believed at an evidence of {needed:g}. "
            f"{about(results)} Audio: {sampling}, from {kind}.",
            table(header, rows),
        ]
    )


# Plots


def plot(found: Mapping[str, Mapping[str, Any]], images: Path) -> None:
    """Draw a plot for each of the results."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "audio-assets"  # the same results, the same file
    from matplotlib import pyplot

    images.mkdir(parents=True, exist_ok=True)

    def save(name: str) -> None:
        for axes in pyplot.gcf().axes:
            axes.spines[["top", "right"]].set_visible(False)
        pyplot.tight_layout()
        pyplot.savefig(images / f"benchmark-{name}.svg", metadata={"Date": None})
        pyplot.close()

    if "faults" in found:
        pyplot.figure(figsize=(7, 3.2))
        styles = {"plain": (_INK, ":"), "fixed": (_INK, "-"), "product": (_ACCENT, "-")}
        for name, label in SYSTEMS.items():
            system = found["faults"]["systems"].get(name)
            if system is None:
                continue
            times = [0.0, *system["done_at_s"]]
            colour, line = styles[name]
            pyplot.step(times, range(len(times)), color=colour, linestyle=line, label=label)
        possible = found["faults"]["systems"]["product"]["cells_possible"]
        pyplot.axhline(possible, color=_INK, linewidth=0.5)
        pyplot.xlabel("seconds since the first attempt")
        pyplot.ylabel("cells computed")
        pyplot.legend(frameon=False)
        save("faults")
    if "accuracy" in found:
        tempi = found["accuracy"]["collections"]["synthesized"]["tempi"]
        _, panels = pyplot.subplots(1, len(tempi), figsize=(2.4 * len(tempi), 2.6), sharey=True)
        for panel, name in zip(panels, _programs(tempi), strict=True):
            truth, found_bpm = zip(*((t, f) for t, f in tempi[name] if f), strict=True)
            for factor in (0.5, 1, 2):
                panel.plot([50, 200], [50 * factor, 200 * factor], color=_INK, linewidth=0.5)
            panel.plot(truth, found_bpm, ".", color=_ACCENT, markersize=4)
            panel.set_title(_PROGRAMS[name], fontsize="medium")
            panel.set_xlabel("true bpm")
            panel.set_ylim(30, 260)
        panels[0].set_ylabel("bpm found")
        save("accuracy")
    if "tempo-calibration" in found:
        means, shares, sizes = zip(*found["tempo-calibration"]["reliability"], strict=True)
        pyplot.figure(figsize=(3.6, 3.2))
        pyplot.plot([0, 1], [0, 1], color=_INK, linewidth=0.5)
        pyplot.scatter(means, shares, s=sizes, color=_ACCENT)
        pyplot.xlabel("bpm_confidence, in ten bins\n(area: number of sounds)")
        pyplot.ylabel("share of right tempi")
        save("confidence")
    if "speed-compare" in found:
        parts = [
            (what, [(CONTESTANTS[n], n, systems[n]) for n in CONTESTANTS if n in systems])
            for what, _, systems in comparisons(found["speed-compare"])
        ]
        heights = [len(bars) for _, bars in parts]
        _, axes = pyplot.subplots(
            len(parts),
            figsize=(7, 0.45 * sum(heights) + 1),
            sharex=True,
            squeeze=False,
            height_ratios=heights,
        )
        for part, (what, bars) in zip(axes[:, 0], parts, strict=True):
            values = [s["cpu_s_per_audio_s"] * 1000 for *_, s in bars]
            colours = [_ACCENT if system == "project" else _INK for _, system, _ in bars]
            drawn = part.barh([label for label, *_ in bars], values, color=colours)
            part.bar_label(drawn, fmt="%.0f", padding=3)
            part.set_title(what, loc="left", fontsize="medium")
            part.invert_yaxis()
        pyplot.xlabel("CPU time per second of audio (ms)")
        save("speed")
    if "speed-orchestration" in found:
        runs = found["speed-orchestration"]["runs"]
        pyplot.figure(figsize=(7, 2.6))
        sizes = [run["files"] for run in runs]
        for key, colour, label in (
            ("wall_ms_per_file", _INK, "wall time"),
            ("cpu_ms_per_file", _ACCENT, "CPU time"),
        ):
            pyplot.plot(sizes, [run[key] for run in runs], "o-", color=colour, label=label)
        pyplot.xscale("log")
        pyplot.ylim(bottom=0)
        pyplot.xlabel("files")
        pyplot.ylabel("ms per file")
        pyplot.legend(frameon=False)
        save("orchestration")


SECTIONS = {
    "faults": faults_section,
    "damage": damage_section,
    "accuracy": accuracy_section,
    "tempo-calibration": confidence_section,
    "speed-compare": compare_section,
    "speed-samples": samples_section,
    "speed-orchestration": orchestration_section,
    "speed-layer": layer_section,
    "drift": drift_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=PROJECT / "docs")
    arguments = parser.parse_args()
    found = {
        name: json.loads(path.read_text())
        for name in SECTIONS
        if (path := arguments.results / f"{name}.json").exists()
    }
    if not found:
        raise SystemExit(f"There are no results in {arguments.results}; run a benchmark first.")
    plot(found, arguments.docs / "images")
    page = [
        "# Benchmarks",
        "Made by `python -m benchmarks.report`; [benchmarks/README.md](../benchmarks/README.md) "
        "explains the figures.",
        *(SECTIONS[name](results) for name, results in found.items()),
    ]
    (arguments.docs / "benchmarks.md").write_text("\n\n".join(page) + "\n")
    print(arguments.docs / "benchmarks.md")


if __name__ == "__main__":
    main()
