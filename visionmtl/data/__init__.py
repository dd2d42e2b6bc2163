"""From data sets on disk to batches on the device."""
