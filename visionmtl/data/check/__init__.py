"""Checking data sets before they are trained on; `base.py` holds the rules, one file each step on the way."""
