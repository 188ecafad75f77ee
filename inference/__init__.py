"""Under infer.py and eval.py."""
