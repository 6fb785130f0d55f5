"""The command `audio-assets`."""
