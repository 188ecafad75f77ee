"""Around train.py's loop."""
