"""`python -m gptfast` is the command `gptfast`."""

import sys

from gptfast.commands import main

if __name__ == "__main__":
    sys.exit(main())
