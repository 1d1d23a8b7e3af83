"""Definitions that come with the package, each under its own name: ``--pipeline=flights``."""
