"""Opening and decoding of audio files of any format, to PCM at 44.1 kHz."""
