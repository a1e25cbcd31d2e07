"""A background job on a terminal: `ptyjob.py DIR [or-file]`.

It writes to its terminal and looks whether it is one still, set as it was. With `or-file` a restart
may also have given it a file to append to in place of the terminal.
"""

import fcntl
import os
import stat
import sys
import termios
import time
from typing import Any

from judge import FIRST_LINK, Judge, judged, link, link_of

STREAMS = (0, 1, 2)


def work(judge: Judge, or_file: bool) -> None:
    for fd in STREAMS:
        assert os.isatty(fd), f"descriptor {fd} is no terminal at the start"
    settings = termios.tcgetattr(0)
    group = os.getpgrp()
    steps, chain = 0, FIRST_LINK
    judge.ready("writes to its terminal", terminal=os.ttyname(0))
    while judge.going():
        os.write(1 + steps % 2, b"step %d\r\n" % steps)
        check_streams(settings, or_file)
        chain = link(chain, steps)
        steps += 1
        judge.progress()
        time.sleep(0.01)
    check_streams(settings, or_file)
    judge.expect(os.getpgrp() == group == os.getpid(), f"its process group is {os.getpgrp()}")
    judge.expect(chain == link_of(steps), "its chain in memory is broken")


def check_streams(settings: list[Any], or_file: bool) -> None:
    for fd in STREAMS:
        if os.isatty(fd):
            assert termios.tcgetattr(fd) == settings, "the terminal is set otherwise"
        else:
            assert or_file, f"descriptor {fd} is no terminal any more"
            assert fd == 0 or appends(fd), f"descriptor {fd} is neither terminal nor log"


def appends(fd: int) -> bool:
    regular = stat.S_ISREG(os.fstat(fd).st_mode)
    return regular and bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge, "or-file" in sys.argv[2:])
