"""The library: its roots and files, their partition keys and formats."""
