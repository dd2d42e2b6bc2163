"""File formats of exported networks, one file each."""
