"""A warehouse of any number of made-up tracks, written within seconds."""

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from audio_assets.features import FEATURE_SETS
from tests.warehouse.rows import START, publisher_of

TAGS = ("rock", "jazz", "electronic", "folk", "ambient", "metal")
CAMELOT = ("8B", "3B", "10B", "5A")
HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e" + "long " * 200_000
"""A tag of 1 MB."""


def generate(directory: Path, count: int) -> Path:
    """Return a new database with `count` tracks.

    Track 0 has a hostile title; track 1 a copy, track 2, with the same content, and a version in
    another format, track 3; the last one was not analysed.
    """
    feature_sets = list(FEATURE_SETS.values())
    publisher_of(directory, feature_sets).publish()
    path = directory / "warehouse.duckdb"
    rng = np.random.default_rng(1)
    number = np.arange(count)
    # Each tag has a centre, and each track is between that of its tag and another one.
    kind, other = rng.integers(len(TAGS), size=(2, count))
    centres, share = rng.random((len(TAGS), 200)), rng.beta(1, 3, (count, 1))
    embeddings = centres[kind] * (1 - share) + centres[other] * share
    embeddings += rng.normal(scale=0.15, size=embeddings.shape)
    embeddings = np.maximum(embeddings, 0).astype(np.float32)
    keys = pd.Series(
        [f"music/artist {n // 100}/{n // 10 % 10} album/{n % 10:02}.mp3" for n in number]
    )
    hashes = pd.Series([f"{n:064x}" for n in number])
    durations = rng.normal(220, 60, count).clip(20)
    titles = pd.Series([f"track {n}" for n in number])
    titles[0] = HOSTILE
    if count > 3:
        hashes[2] = hashes[1]
        durations[[2, 3]] = durations[1]
        embeddings[[2, 3]] = embeddings[1], embeddings[1] * 1.001
    common = pd.DataFrame({"file_key": keys, "content_hash": hashes, "computed_at": START})
    tables = {
        "library.files": pd.DataFrame(
            {
                "file_key": keys,
                "path": "/" + keys,
                "content_hash": hashes,
                "duration_s": durations,
                "gone": False,
            }
        ),
        "features.metadata": common.assign(
            title=titles,
            artist=[f"artist {n // 100}" for n in number],
            album=[f"album {n // 10}" for n in number],
            date=(1960 + rng.integers(60, size=count)).astype(str),
            duration_s=durations,
            container="mp3",
            tags='{"mood": "calm"}',
        ),
        "features.rhythm": common.assign(
            bpm=rng.normal(100 + 10 * kind, 8), beats=[np.arange(0, 60, 0.5)] * count
        ),
        "features.key": common.assign(camelot=rng.choice(CAMELOT, count), key="C", scale="minor"),
        "features.loudness": common.assign(integrated_lufs=rng.normal(-12, 4, count)),
    }
    musicnn = pa.table(
        {
            **{name: pa.array(column) for name, column in common.items()},
            "top_tag": np.array(TAGS)[kind].tolist(),
            "top_tags": [[TAGS[k], TAGS[k - 1]] for k in kind],
            "msd_tags": pa.array(
                [[(TAGS[k], 0.5), (TAGS[k - 1], 0.25)] for k in kind],
                pa.map_(pa.string(), pa.float32()),
            ),
            "embedding": pa.FixedSizeListArray.from_arrays(embeddings.ravel(), 200),
        }
    )
    with duckdb.connect(str(path)) as connection:
        for name, rows in tables.items():
            analysed = rows if name == "library.files" else rows.iloc[:-1]
            connection.register("rows", analysed)
            connection.execute(f"INSERT INTO {name} BY NAME FROM rows")
        connection.register("rows", musicnn.slice(0, count - 1))
        connection.execute("INSERT INTO features.musicnn BY NAME FROM rows")
    return path
