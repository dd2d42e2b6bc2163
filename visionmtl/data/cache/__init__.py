"""Decoded training images kept on disk."""
