"""Benchmarks: each case is one question, declared in a registry; one runner answers them. See README.md."""
