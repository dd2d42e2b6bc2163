"""Feature pyramids: one file each, all with the same channels on every level."""
