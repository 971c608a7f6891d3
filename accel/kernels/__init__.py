"""Loops and launchers: nothing numerical is decided here (see README.md in this folder)."""
