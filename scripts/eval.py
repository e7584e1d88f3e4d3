"""Door from a clone to `gptfast eval`, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptfast.commands import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
