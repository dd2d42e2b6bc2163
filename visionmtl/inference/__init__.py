"""Predictions outside training: from images, to files."""
