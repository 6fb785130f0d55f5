"""Puts the weights of MusiCNN into the wheel, also into an editable one.

They are published in the `musicnn` wheel alone, whose own requirements (an old TensorFlow, NumPy
before 1.17) cannot be installed and are not needed: pip downloads it without them.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

REQUIREMENT = (
    "musicnn==0.1.0 --hash=sha256:f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa"
)
DIRECTORY = "audio_assets_weights"
"""Where the files go, beside the packages; `audio_assets.features.musicnn_network` reads them."""

FILES = (
    "musicnn-0.1.0.dist-info/LICENSE.md",
    "musicnn/configuration.py",
    *(
        f"musicnn/{model}/{name}"
        for model in ("MSD_musicnn", "MTT_musicnn")
        for name in (".index", ".data-00000-of-00001")
    ),
)


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds the files to what is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Download the files and name them to the builder."""
        self._downloaded = tempfile.TemporaryDirectory()
        folder = Path(self._downloaded.name)
        (folder / "requirements.txt").write_text(REQUIREMENT)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        try:
            subprocess.run([*pip, "--requirement=requirements.txt"], cwd=folder, check=True)
        except subprocess.CalledProcessError:
            raise RuntimeError(
                "the weights of MusiCNN, in the package musicnn 0.1.0, cannot be downloaded"
            ) from None
        (wheel,) = folder.glob("*.whl")
        with ZipFile(wheel) as archive:
            archive.extractall(folder, FILES)
        kind = "force_include_editable" if version == "editable" else "force_include"
        for name in FILES:
            place = Path(DIRECTORY, *Path(name).parts[1:])
            build_data[kind][str(folder / name)] = str(place)

    def finalize(self, *_: Any) -> None:
        """Remove what was downloaded."""
        self._downloaded.cleanup()
