"""One file per detection head; `base.py` holds the contract."""
