"""``python -m linzoo``: the command `linzoo`."""

import sys

from linzoo.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
