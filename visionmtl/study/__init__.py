"""Fair comparisons: many runs over several seeds by one command, their differences with intervals, what they cost."""
