"""Benchmarks beside the peers: `pytest benchmarks/`. The results go to benchmarks/results, and from there to the README."""
