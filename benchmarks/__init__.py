"""Under bench.py."""
