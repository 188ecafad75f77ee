"""The benchmarks of bench.py, one kind a file."""
