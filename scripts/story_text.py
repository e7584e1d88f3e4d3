"""Writes the stories that calibrate a quantizer where nobody gives a better text.

    python scripts/story_text.py gptfast/storyteller/stories.txt

They have the seeds `calibration N`: neither training nor any measurement has used them.
"""

import sys
from itertools import count
from pathlib import Path

from story_grammar import compose

MAX_BYTES = 300_000
SEPARATOR = "\n<|endoftext|>\n"


def calibration_story(index: int) -> str:
    return compose(f"calibration {index}")


def calibration_text() -> str:
    """Stories, one after the other, as many as fit."""
    stories: list[str] = []
    size = 0
    for index in count():
        story = calibration_story(index)
        size += len((story + SEPARATOR).encode())
        if size > MAX_BYTES:
            return SEPARATOR.join(stories) + "\n"
        stories.append(story)
    raise AssertionError


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(calibration_text(), encoding="utf-8")
