"""The Dagster definitions: one module per kind of definition."""
