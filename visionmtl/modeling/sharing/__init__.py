"""One file per way for tasks to share the encoder and pyramid; `base.py` holds the contract."""
