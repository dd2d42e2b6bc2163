"""One file per way of combining task gradients; `base.py` holds the contract."""
