"""How far the alternative extractors agree with the primary ones, column by column.

    python -m benchmarks.extractors

It analyses the sample library and, if `AUDIO_TEST_RECORDINGS` names a directory, its recordings,
and writes docs/extractors.md.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from audio_assets.audio.decode import decode
from audio_assets.audio.errors import AudioFileError
from audio_assets.audio.pcm import Audio
from audio_assets.cli.sample_library import make_sample_library
from audio_assets.features import FEATURE_SETS
from benchmarks.measure import PROJECT

SAME, CLOSE = 0.02, 0.2
"""Median difference, as a share of the spread among files, up to which columns may be compared."""

HEAD = """# Primary and alternative extractors

What `python -m benchmarks.extractors` found on {files} files: the synthesized sample library{more}.

The *difference* is the median over files of the absolute difference between the two; the *spread*
is the primary's between files (10th to 90th percentile). A column may be compared across extractors
if the difference is under {same:.0%} of the spread, roughly so under {close:.0%}. Of text, the
share of files with different values is given. The column `extractor` says which one made a row;
rows of the alternative are in `features.degraded`.

| column | primary, alternative | difference | spread | unit | comparable |
| --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Compare the extractors and write the page."""
    pairs: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)
    files = 0
    recordings = os.environ.get("AUDIO_TEST_RECORDINGS")
    with tempfile.TemporaryDirectory() as scratch:
        for audio in _tracks(Path(scratch), recordings):
            files += 1
            for name, feature_set in FEATURE_SETS.items():
                if not feature_set.reads_pcm:
                    continue
                first, second = feature_set.extract(audio), feature_set.extract_alternative(audio)
                for column in feature_set.columns:
                    pairs[name, column.name].append((first[column.name], second[column.name]))
    page = HEAD.format(
        files=files,
        more=" and real recordings" if recordings else "",
        same=SAME,
        close=CLOSE,
    )
    for (name, column), values in pairs.items():
        page += _row(name, column, values)
    (PROJECT / "docs" / "extractors.md").write_text(page, "utf-8")


def _tracks(scratch: Path, recordings: str | None) -> Iterator[Audio]:
    sample = make_sample_library(scratch / "sample_library")
    paths = [track.path for track in sample if track.fault is None]
    if recordings:
        paths += sorted(path for path in Path(recordings).rglob("*") if path.is_file())
    for path in paths:
        try:
            decode(path, scratch / "pcm.npy")
        except AudioFileError:
            continue
        yield Audio.open(scratch / "pcm.npy", path)


def _row(name: str, column: str, values: list[tuple[Any, Any]]) -> str:
    feature_set = FEATURE_SETS[name]
    unit = next(each.unit for each in feature_set.columns if each.name == column) or ""
    known = [(a, b) for a, b in values if a is not None and b is not None]
    libraries = f"{feature_set.extractor}, {feature_set.alternative}"
    if not known:
        return f"| `{name}.{column}` | {libraries} | | | | one of them has none |\n"
    first, second = ([_numbers(pair[side]) for pair in known] for side in (0, 1))
    if first[0] is None:
        differ = np.mean([a != b for a, b in known])
        verdict = "yes" if differ <= SAME else "roughly" if differ <= CLOSE else "no"
        return f"| `{name}.{column}` | {libraries} | {differ:.0%} of files | | | {verdict} |\n"
    length = min(len(each) for each in (*first, *second))
    one, other = (np.array([each[:length] for each in side]) for side in (first, second))
    difference = float(np.median(np.abs(one - other)))
    spread = float(np.median(np.quantile(one, 0.9, axis=0) - np.quantile(one, 0.1, axis=0)))
    share = difference / spread if spread else float(difference > 0)
    verdict = "yes" if share <= SAME else "roughly" if share <= CLOSE else "no"
    return (
        f"| `{name}.{column}` | {libraries} | {difference:.3g} | {spread:.3g} | {unit} "
        f"| {verdict} |\n"
    )


def _numbers(value: Any) -> list[float] | None:
    """Return a value as a list of numbers; None if it is text."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if not isinstance(value, list):
        value = [value]
    return None if any(isinstance(each, str) for each in value) else [float(v) for v in value]


if __name__ == "__main__":
    main()
