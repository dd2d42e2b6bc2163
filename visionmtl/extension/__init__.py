"""One file per way of adding tasks to a trained network; `base.py` holds the contract."""
