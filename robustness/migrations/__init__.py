"""Migrations of the state store's schema; `robustness.state` applies them at first use."""
