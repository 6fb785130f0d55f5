"""`python -m audio_assets` is the command line."""

from audio_assets.cli import app

if __name__ == "__main__":
    app()
