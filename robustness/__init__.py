"""Resilience for long batch work: breakers, learned timeouts, classification, retries, workers."""
