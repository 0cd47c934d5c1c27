"""Benchmarks: `python -m bench` measures everything; each script here also runs alone as `python -m bench.<name>`."""
