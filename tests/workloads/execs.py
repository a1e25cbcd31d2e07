"""Short-lived children all the time: `execs.py DIR [vfork]`, a fork is always in flight.

Each child ends with a code that is known beforehand. With `vfork` some are made by posix_spawn: its
parent cannot be stopped until the child has done its exec.
"""

import os
import random
import signal
import sys
import time

from judge import FIRST_LINK, Judge, judged, link, link_of

ALIVE = 4  # children at a time
SHELL = "/bin/sh"


def work(judge: Judge, with_vfork: bool) -> None:
    ways = [just_exit, exec_shell, exec_shell_that_forks, be_killed]
    expected: dict[int, int] = {}  # by pid
    ended, chain = 0, FIRST_LINK
    judge.ready("forks and waits")
    while judge.going() or expected:
        while len(expected) < ALIVE and judge.going():
            code = random.randrange(1, 100)
            if with_vfork and random.random() < 0.5:
                expected[spawn(code)] = code
                continue
            way = random.choice(ways)
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(random.random() * 0.01)
                way(code)
                os._exit(100)
            expected[pid] = -signal.SIGKILL if way is be_killed else code
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        assert pid in expected, f"a child {pid} ended that nobody had started"
        assert code == expected[pid], f"child {pid} ended with {code}, not {expected[pid]}"
        del expected[pid]
        chain = link(chain, ended)
        ended += 1
        judge.progress()
    judge.expect(chain == link_of(ended), "the chain in memory is broken")


def just_exit(code: int) -> None:
    os._exit(code)


def be_killed(_code: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exec_shell(code: int) -> None:
    os.execv(SHELL, [SHELL, "-c", f"exit {code}"])


def exec_shell_that_forks(code: int) -> None:
    os.execv(SHELL, [SHELL, "-c", f"(exit {code}); exit $?"])


def spawn(code: int) -> int:
    arguments = [SHELL, "-c", f"exit {code}"]
    return os.posix_spawn(SHELL, arguments, os.environ, setsigmask=(), setsigdef=())


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge, "vfork" in sys.argv[2:])
