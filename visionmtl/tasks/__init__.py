"""One file per task; `base.py` holds the contract."""
