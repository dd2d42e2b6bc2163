"""One meter a file: predictions of one split against the truth at original resolution, under a named protocol."""
