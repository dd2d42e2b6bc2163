"""Meters: one file per metric."""
