"""Benchmarks: one script per question, run as `python -m bench.<name> --output FILE`; results lie in bench/results."""
