"""`python -m moert`."""

from __future__ import annotations

import sys

from moert.cli import main

if __name__ == "__main__":
    sys.exit(main())
