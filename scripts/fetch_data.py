"""Fetch the offline data sets: ``python scripts/fetch_data.py --list``, then give names."""

import sys

from mlkit.data.fetch import main

if __name__ == "__main__":
    sys.exit(main())
