"""A program that takes every byte of a disk that becomes free, as another job on a full disk does."""

FILLER = """
import sys, time
with open(sys.argv[1], "wb", buffering=0) as file:
    while True:
        try:
            file.write(b"0" * 65536)
        except OSError:
            print(flush=True)
            time.sleep(0.001)
"""
"""Its argument: the file to fill. It prints an empty line whenever the disk is full."""
