"""What the workers' fork server imports once, so that a new worker starts in milliseconds."""

import librosa
import scipy.fft
import scipy.ndimage

import audio_assets.extraction.worker
import audio_assets.features.kernels
import audio_assets.features.musicnn_network  # with onnx and onnxruntime
from audio_assets.features.essentia_library import essentia
from audio_assets.features.registry import import_feature_sets
from audio_assets.warehouse.arrow import leave_out_pandas

__all__ = ["audio_assets", "librosa", "scipy"]

essentia()
import_feature_sets()
leave_out_pandas()
