"""One file per dense decoder; `base.py` holds the contract."""
