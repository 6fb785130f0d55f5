"""What the workers' fork server imports once, so that a new worker starts in milliseconds."""

import librosa
import pandas  # pyarrow imports it when it converts its first row
import scipy.signal  # with scipy.fft and scipy.ndimage

import audio_assets.extraction.worker
import audio_assets.features.musicnn_network  # with onnx and onnxruntime
from audio_assets.features import FEATURE_SETS
from audio_assets.features.essentia_library import essentia

__all__ = ["FEATURE_SETS", "audio_assets", "librosa", "pandas", "scipy"]

essentia()
