"""Checking data sets before they are trained on; `rules.py` says what is wrong, `survey.py` reads every image."""
