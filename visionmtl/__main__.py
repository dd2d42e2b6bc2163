"""`python -m visionmtl`: the command where its script is not on the path."""

import sys

from visionmtl.cli import main

if __name__ == "__main__":
    sys.exit(main())
