"""Audio features of whole music libraries, as Dagster assets."""
