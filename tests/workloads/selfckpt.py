"""A program that checkpoints itself: `selfckpt.py DIR CHECKPOINT_FILE`, e.g. /krg/self/checkpoint.

It writes `1` there and reads the outcome on the same descriptor. When it is restarted it goes on
from there again, and each life adds its outcome to DIR/outcomes: `APP/vN` the one that made the
image, `restarted APP/vN` the one that came out of it.
"""

import os
import re
import sys
import time

from judge import FIRST_LINK, Judge, judged, link, link_of

OUTCOME = re.compile(r"(restarted )?[^/ ]+/v[1-9][0-9]*")


def work(judge: Judge, checkpoint: str) -> None:
    judge.ready(f"checkpoints itself through {checkpoint}")
    outcome = checkpoint_self(checkpoint)
    with open(judge.path("outcomes"), "a") as file:
        file.write(outcome + "\n")
    steps, chain = 0, FIRST_LINK
    while judge.going():
        chain = link(chain, steps)
        steps += 1
        judge.progress()
        time.sleep(0.01)
    judge.expect(bool(OUTCOME.fullmatch(outcome)), f"the outcome was {outcome!r}")
    judge.expect(chain == link_of(steps), "the chain in memory is broken")


def checkpoint_self(path: str) -> str:
    """Return the outcome, once there is one, as it is read behind what was written."""
    fd = os.open(path, os.O_RDWR)
    behind = os.write(fd, b"1\n")
    outcome = "running"
    while outcome.startswith("running"):
        time.sleep(0.005)
        os.lseek(fd, behind, os.SEEK_SET)
        outcome = os.read(fd, 4096).decode().strip()
    os.close(fd)
    return outcome


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge, sys.argv[2])
