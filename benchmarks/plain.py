"""One feature set of one file, as somebody calls the extractors who has nothing but them."""

from pathlib import Path

from audio_assets.audio.decode import Limits
from audio_assets.extraction.worker import FileRef, decode_file, extract
from audio_assets.features.base import FeatureSet, Row
from audio_assets.library.files import FileStamp
from audio_assets.warehouse.schema import arrow_schema


def extract_row(path: Path, feature_set: FeatureSet, pcm: Path) -> Row:
    """Extract a feature set, decoding the file to `pcm` first where that is needed."""
    file = FileRef(path, FileStamp.of(path.stat()), pcm)
    if feature_set.reads_pcm and not pcm.exists():
        decode_file(file, "av", Limits())
    schema = arrow_schema(tuple(feature_set.columns))
    return extract(file, feature_set, schema, "primary", None).row
