"""Another user's process: `otheruid.py DIR UID GID [GROUP,GROUP...]`, started by root.

It gives up root before it is ready, and then looks at its credentials all the time. DIR must be
within reach of that user.
"""

import ctypes
import os
import sys
import time

from judge import AppendLog, Judge, judged

PR_SET_DUMPABLE = 4
UMASK = 0o077
SHOWN = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs")


def work(judge: Judge, uid: int, gid: int, groups: list[int]) -> None:
    for name in ("", "progress", "stdout", "stderr"):
        if os.path.exists(judge.path(name)):
            os.chown(judge.path(name), uid, gid)
    give_up(uid, gid, groups)
    os.umask(UMASK)
    log = AppendLog(judge.path("log"))
    mine = credentials()
    judge.ready(f"works as uid {uid}")
    while judge.going():
        log.append()
        assert os.getresuid() == (uid, uid, uid), f"its uids are {os.getresuid()}"
        assert os.getresgid() == (gid, gid, gid), f"its gids are {os.getresgid()}"
        assert sorted(os.getgroups()) == sorted(groups), f"its groups are {os.getgroups()}"
        judge.progress()
        time.sleep(0.005)
    log.check()
    for name, was in mine.items():
        judge.expect(credentials()[name] == was, f"{name} is {credentials()[name]}, not {was}")
    umask = os.umask(UMASK)
    judge.expect(umask == UMASK, f"the umask is {umask:03o}")
    judge.expect(not may_become_root(uid), "it may become root")


def give_up(uid: int, gid: int, groups: list[int]) -> None:
    """Become that user, for good, and be as open to tracing as a program that this user started."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_DUMPABLE)")


def credentials() -> dict[str, str]:
    with open("/proc/self/status") as file:
        lines = (line.rstrip("\n").split(":", 1) for line in file)
        return {name: value.strip() for name, value in lines if name in SHOWN}


def may_become_root(uid: int) -> bool:
    if uid == 0:
        return False
    try:
        os.setuid(0)
    except PermissionError:
        return False
    return True


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        groups = [int(group) for group in "".join(sys.argv[4:5]).split(",") if group]
        work(judge, int(sys.argv[2]), int(sys.argv[3]), groups)
