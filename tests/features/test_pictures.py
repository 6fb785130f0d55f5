"""What the UI shows of a row: small, well-formed, and nothing where there is nothing."""

import re
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

from audio_assets.audio.pcm import SAMPLE_RATE, Samples
from audio_assets.features import FEATURE_SETS
from audio_assets.features.pictures import INLINE_CHARACTERS, bars, columns, curve, markdown
from tests.features.conftest import MakeAudio

PICTURED = [name for name, feature_set in FEATURE_SETS.items() if feature_set.picture]


def svg_of(shown: str) -> str:
    found = re.fullmatch(r"!\[[^\]]*\]\(<data:image/svg\+xml,([^<>\n]*)>\)", shown)
    assert found, shown
    return unquote(found[1])


@pytest.mark.parametrize("name", PICTURED)
def test_picture_of_a_row_fits_in_place(name: str, music: Samples, make_audio: MakeAudio) -> None:
    feature_set = FEATURE_SETS[name]
    assert feature_set.picture is not None
    svg = feature_set.picture(feature_set.extract(make_audio(music)))
    assert svg is not None
    shown = markdown(svg, name)
    assert len(shown) < INLINE_CHARACTERS
    ElementTree.fromstring(svg_of(shown))


@pytest.mark.parametrize("name", PICTURED)
def test_silence_can_be_drawn(name: str, make_audio: MakeAudio) -> None:
    feature_set = FEATURE_SETS[name]
    assert feature_set.picture is not None
    silence = make_audio(np.zeros(SAMPLE_RATE * 4, np.float32))
    svg = feature_set.picture(feature_set.extract(silence))
    assert svg is None or ElementTree.fromstring(svg) is not None


def test_long_curves_are_thinned() -> None:
    seconds = [0.5 * i for i in range(20_000)]
    svg = curve(seconds, [120 + i % 7 for i in range(20_000)], " s", " bpm")
    assert svg is not None
    assert len(markdown(svg, "tempo")) < INLINE_CHARACTERS
    assert "0<" in svg
    assert "10000 s" in svg


def test_names_are_text_whatever_they_hold() -> None:
    hostile = "</text><script>alert(1)</script>&](x)"
    svg = bars({hostile: 1.0})
    assert svg is not None
    drawn = ElementTree.fromstring(svg_of(markdown(svg, "names")))
    assert hostile in [element.text for element in drawn.iter()]


def test_nothing_to_draw() -> None:
    assert bars({"level": None}) is None
    assert columns(None) is None
    assert curve([1.0], [1.0]) is None
