"""Under report.py and ablate.py."""
