"""``python -m tests.lifecycle`` runs the matrix and writes docs/lifecycle.md."""

import sys

from tests.lifecycle.matrix import main  # from a module of that name, which processes that are spawned can import

if __name__ == "__main__":
    sys.exit(main())
