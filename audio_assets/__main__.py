"""`python -m audio_assets` is the command line."""

from audio_assets.cli.app import main

if __name__ == "__main__":
    main()
