"""One epoll over an eventfd, a pipe and an inotify on DIR; a semaphore and a one-shot at rest."""

import ctypes
import os
import select
import struct
import sys
import time
from contextlib import suppress

from judge import Judge, judged

IN_CREATE, IN_DELETE = 0x100, 0x200
EVENT = struct.Struct("iIII")
RESTING = 5  # value of the semaphore that nobody takes
PATIENCE_S = 0.05


class Watch:
    """An inotify on a directory. What was queued and not yet read is lost in an image."""

    def __init__(self, directory: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watch = libc.inotify_add_watch(self.fd, directory.encode(), IN_CREATE | IN_DELETE)
        assert self._watch >= 0, os.strerror(ctypes.get_errno())
        self._touched = os.path.join(directory, "touched")

    def touch(self) -> None:
        """Make something appear and vanish. After a restart it may be there, or gone, already."""
        with suppress(FileExistsError):
            os.mkdir(self._touched)
        with suppress(FileNotFoundError):
            os.rmdir(self._touched)

    def has_seen(self) -> bool:
        """Read all events; returns whether one of them was our touch."""
        data, seen = os.read(self.fd, 65536), False
        while data:
            watch, mask, _, length = EVENT.unpack_from(data)
            name = data[EVENT.size : EVENT.size + length].rstrip(b"\0")
            data = data[EVENT.size + length :]
            assert watch == self._watch, f"an event of watch {watch}, which is not ours"
            seen = seen or (name == b"touched" and bool(mask & (IN_CREATE | IN_DELETE)))
        return seen


def work(judge: Judge) -> None:
    epoll = select.epoll()
    counter = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    resting = os.eventfd(RESTING, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
    once = os.eventfd(1, os.EFD_NONBLOCK)
    out, into = os.pipe()
    watch = Watch(judge.directory)
    epoll.register(once, select.EPOLLIN | select.EPOLLONESHOT)
    assert epoll.poll(1) == [(once, select.EPOLLIN)]  # from now on it is quiet
    epoll.register(counter, select.EPOLLIN)
    epoll.register(out, select.EPOLLIN | select.EPOLLET)
    epoll.register(watch.fd, select.EPOLLIN)
    judge.ready("waits on an epoll", resting=resting)
    step = 0
    while judge.going():
        step += 1
        os.eventfd_write(counter, step)
        os.write(into, step.to_bytes(8, "little"))
        watch.touch()
        missing = {counter: "eventfd", out: "pipe", watch.fd: "inotify"}
        for _ in range(40):
            for fd, events in epoll.poll(PATIENCE_S):
                assert events == select.EPOLLIN, f"epoll gave events {events:#x}"
                if fd == counter:
                    value = os.eventfd_read(counter)
                    assert value == step, f"the eventfd held {value}, not {step}"
                elif fd == out:
                    value = int.from_bytes(os.read(out, 64), "little")
                    assert value == step, f"the pipe held {value}, not {step}"
                elif fd != watch.fd:
                    raise AssertionError(f"epoll woke up for descriptor {fd}")
                elif not watch.has_seen():
                    continue
                missing.pop(fd, None)
            if not missing:
                break
            watch.touch()
        assert not missing, f"epoll does not tell of the {' and the '.join(missing.values())}"
        judge.progress()
        time.sleep(0.005)
    taken = 0
    while taken <= RESTING and select.select([resting], [], [], 0)[0]:
        taken += os.eventfd_read(resting)
    judge.expect(taken == RESTING, f"the semaphore held {taken}, not {RESTING}")
    judge.expect(os.eventfd_read(once) == 1, "the one-shot eventfd has another value")


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
