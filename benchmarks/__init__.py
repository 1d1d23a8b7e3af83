"""Benchmarks: the same two jobs for this project and its peers, as whole processes (docs/benchmarks.md)."""
