"""The command line: `python -m audio_assets`, and what the script `audio-assets` imports.

Each worker imports the script again, so this imports nothing at its top.
"""


def main() -> None:
    """Run the command line."""
    from audio_assets.cli.app import main

    main()


if __name__ == "__main__":
    main()
