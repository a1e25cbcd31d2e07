"""64 threads in step: each with a chain of its own, all with a lock, conditions and their tid."""

import array
import sys
import threading
import time

from judge import Judge, judged, link

THREADS = 64
STEPS = 4  # of every thread in a round


class Team:
    """What the threads share.

    Every chain is kept twice: by its thread in `chains`, and by whoever ends a round in `ledger`.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.rounds = 0
        self.going = True
        self.chains = array.array("Q", [0] * THREADS)  # at an address that can be told
        self.ledger = [0] * THREADS
        self.total = 0
        self.lock = threading.Lock()
        self.turn = 0
        turns = threading.Lock()
        self.turns = [threading.Condition(turns) for _ in range(THREADS)]
        self.barrier = threading.Barrier(THREADS, action=self.end_round)
        self.own = threading.local()

    def work(self, index: int) -> None:
        self.own.index, tid = index, threading.get_native_id()
        try:
            while self.going:
                for step in range(STEPS):
                    self.chains[index] = self.follow(self.chains[index], index, step)
                    with self.lock:
                        self.total += 1
                self.take_turn(index)
                assert self.own.index == index, "its thread-local data are another's"
                assert threading.get_native_id() == tid, f"its tid was {tid}"
                self.barrier.wait()
        except threading.BrokenBarrierError:
            pass
        except AssertionError as exc:
            self.judge.fail(f"thread {index}: {exc}")
            self.barrier.abort()

    def take_turn(self, index: int) -> None:
        following = (index + 1) % THREADS
        with self.turns[index]:
            while self.turn != index:
                assert not self.barrier.broken, "the others have stopped"
                self.turns[index].wait(0.5)
            self.turn = following
            self.turns[following].notify()

    def end_round(self) -> None:
        """Compare all there is, count, and decide for all whether to go on.

        Run by one thread while the others wait for it.
        """
        for index in range(THREADS):
            for step in range(STEPS):
                self.ledger[index] = self.follow(self.ledger[index], index, step)
            same = self.chains[index] == self.ledger[index]
            self.judge.expect(same, f"the chain of thread {index} is broken")
        self.rounds += 1
        expected = self.rounds * STEPS * THREADS
        self.judge.expect(self.total == expected, f"{self.total} of {expected} steps with the lock")
        self.going = self.judge.going()
        self.judge.progress()
        time.sleep(0.01)

    def follow(self, chain: int, index: int, step: int) -> int:
        """Return the next link of a chain that is kept as a number."""
        number = (self.rounds * STEPS + step) * THREADS + index
        return int.from_bytes(link(chain.to_bytes(8, "little"), number), "little")


def work(judge: Judge) -> None:
    team = Team(judge)
    threads = [threading.Thread(target=team.work, args=(i,), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    judge.ready(f"runs {THREADS} threads in step", chains=hex(team.chains.buffer_info()[0]))
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    with judged(sys.argv[1]) as judge:
        work(judge)
