"""One network that detects, segments and measures depth."""
