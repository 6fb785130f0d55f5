"""What the workers' fork server imports once, so that a new worker starts in milliseconds."""

import gc
from importlib import import_module

from audio_assets.features.essentia_library import essentia
from audio_assets.features.registry import import_feature_sets
from audio_assets.warehouse.arrow import leave_out_pandas

gc.disable()  # it takes a tenth of the time of imports
for module in (
    "librosa",
    "scipy.fft",
    "scipy.ndimage",
    "audio_assets.extraction.worker",
    "audio_assets.features.kernels",
    "audio_assets.features.musicnn_network",  # with onnx and onnxruntime
):
    import_module(module)
essentia()
import_feature_sets()
leave_out_pandas()
gc.freeze()  # no worker searches what was imported, which would copy its memory, too
gc.enable()
