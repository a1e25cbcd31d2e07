"""What CRIU is told, what its files and logs say: without CRIU, on trees and logs made up here."""

import ipaddress
import os
import socket
import struct
from pathlib import Path

import pytest
import trio

from agent import (
    criu,
    criu_format,
    criu_images,
    criu_network,
    criu_options,
    criu_run,
    criu_words,
)
from agent.criu_format import BYTES, FIXED32, FIXED64, VARINT, Field
from agent.criu_options import Option, Substitute
from agent.outside import End
from agent.procs import ProcessTree
from krgfs import facts
from krgfs.errors import (
    CannotRunHere,
    Damaged,
    EngineFailed,
    Exists,
    KrgError,
    NoRoom,
    TryAgain,
    Unsupported,
)
from krgfs.facts import Ids, Task
from krgfs.model import Frozen, ProcessId
from krgfs.verbs import Checkpoint, Then

US = Ids(uids=(*os.getresuid(), 0), gids=(*os.getresgid(), 0), groups=(), tgid=0, ns_pids=(4242, 7))


def tree(sid: int = 4242, ids: Ids = US) -> ProcessTree:
    task = Task(4242, b"blast", "S", 1, 4242, sid, 0, 0, 1, 99, 0, 0)
    return ProcessTree(
        id=ProcessId(pid=4242, start=99, boot=facts.BOOT_ID),
        tasks=(task,),
        credentials={4242: ids},
        threads={4242: (4242,)},
        pid_ns=facts.namespace(os.getpid(), "pid"),
    )


def chosen(
    of: ProcessTree | None = None,
    words: Checkpoint | None = None,
    ends: tuple[End, ...] = (),
    frozen: Frozen | None = None,
    has_tcp: bool = False,
    as_user: Ids | None = None,
) -> list[tuple[str, ...]]:
    found = criu_options.for_dump(
        of or tree(),
        Path("/into"),
        Path("/work"),
        words or Checkpoint(),
        ends,
        frozen,
        has_tcp=has_tcp,
        as_user=as_user,
    )
    assert all(option.reason for option in found)
    return [option.words for option in found]


def end(kind: str, name: str, fd: int) -> End:
    return End(kind, name, 4242, fd, "rw", "somewhere")


# -- options


def test_every_dump() -> None:
    words = chosen()
    assert ("--tree", "7") in words, "the pid is the one of its own namespace"
    assert ("--leave-running",) in words
    assert ("--manage-cgroups=ignore",) in words
    assert ("--network-lock", "skip") in words
    assert ("--stream",) in words and ("--images-dir", "/into") in words
    assert not {"--shell-job", "--tcp-established", "--freeze-cgroup"} & {w[0] for w in words}
    assert not {"--link-remap", "--leave-stopped"} & {w[0] for w in words}


def test_who_leads_the_session() -> None:
    assert ("--shell-job",) in chosen(tree(sid=4000))
    assert ("--shell-job",) in chosen(ends=(end("tty", "tty[8803:19]", 0),))
    both = chosen(tree(sid=4000), ends=(end("tty", "tty[8803:19]", 0),))
    assert both.count(("--shell-job",)) == 1


def test_connections() -> None:
    assert not [words for words in chosen(has_tcp=True) if "tcp" in words[0]]
    keep = chosen(words=Checkpoint(tcp="keep"), has_tcp=True)
    assert ("--tcp-established",) in keep and ("--network-lock", "nftables") in keep
    close = chosen(words=Checkpoint(tcp="close"), has_tcp=True)
    assert ("--tcp-close",) in close and ("--skip-in-flight",) in close
    assert ("--network-lock", "skip") in close


def test_without_connections_nothing_is_locked() -> None:
    keep = chosen(words=Checkpoint(tcp="keep"))
    assert ("--network-lock", "skip") in keep and ("--tcp-established",) not in keep


@pytest.mark.parametrize(
    ("then", "tcp", "ends"),
    [
        (Then("run"), "keep", False),
        (Then("kill"), "keep", True),
        (Then("kill", 15), "keep", False),
        (Then("kill"), "close", False),
        (Then("stop"), "keep", False),
    ],
)
def test_what_ends_with_its_dump(then: Then, tcp: str, ends: bool) -> None:
    words = chosen(words=Checkpoint(then=then, tcp=tcp), has_tcp=True)
    assert (("--leave-running",) not in words) is ends
    assert (("--action-script", "/work/last-word") in words) is ends
    assert criu.is_ended_by([Option(each, "") for each in words]) is ends


def test_a_frozen_tree() -> None:
    frozen = Frozen(cgroup="/sys/fs/cgroup/x", version=2, leaf=True)
    assert ("--freeze-cgroup", "/sys/fs/cgroup/x") in chosen(frozen=frozen)


def test_unix_sockets() -> None:
    ends = (end("unix", "unix[5]", 1), end("unix", "unix[5]", 2), end("unix", "unix[9]", 7))
    words = chosen(ends=ends)
    assert words.count(("--external", "unix[5]")) == 1
    assert ("--external", "unix[9]") not in words
    assert ("--ext-unix-sk",) in words


def test_another_user_is_dumped_as_themselves() -> None:
    theirs = US._replace(uids=(7, 7, 7, 7), gids=(8, 8, 8, 8), groups=(8, 9))
    assert criu_options.user_to_be(tree(), may_read_limits=False) is None
    assert criu_options.user_to_be(tree(ids=theirs), may_read_limits=False) == theirs
    assert criu_options.user_to_be(tree(ids=theirs), may_read_limits=True) is None
    assert ("--unprivileged",) in chosen(tree(ids=theirs), as_user=theirs)
    assert ("--unprivileged",) not in chosen()
    mixed = theirs._replace(uids=(7, 0, 7, 7))
    with pytest.raises(Unsupported, match="CAP_SYS_RESOURCE"):
        criu_options.user_to_be(tree(ids=mixed), may_read_limits=False)


# -- image files


def varint(number: int, value: int) -> Field:
    return Field(number, VARINT, value)


def image(path: Path, magics: tuple[int, ...], *entries: list[Field]) -> None:
    body = b"".join(struct.pack("<I", len(raw)) + raw for raw in map(criu_format.build, entries))
    path.write_bytes(b"".join(struct.pack("<I", magic) for magic in magics) + body)


FILES = (criu_images.COMMON_MAGIC, criu_images.FILES_MAGIC)
PSTREE = (criu_images.COMMON_MAGIC, criu_images.PSTREE_MAGIC)
PAGEMAP = (criu_images.COMMON_MAGIC, criu_images.PAGEMAP_MAGIC)


def file_entry(number: int, fields: list[Field]) -> list[Field]:
    return [varint(1, 17), varint(2, 1), Field(number, BYTES, criu_format.build(fields))]


def pipe(inode: int, flags: int) -> list[Field]:
    return file_entry(criu_images.FILE_PIPE, [varint(1, 1), varint(2, inode), varint(3, flags)])


def timer(ticks: int, value: tuple[int, int], interval: tuple[int, int]) -> list[Field]:
    numbers = zip((5, 7, 8, 9, 10), (ticks, *value, *interval), strict=True)
    return file_entry(criu_images.FILE_TIMERFD, [varint(*each) for each in numbers])


def test_a_message_is_put_together_as_it_was() -> None:
    fields = [
        varint(1, 0),
        varint(2, (1 << 64) - 1),
        Field(300, BYTES, b"abc"),
        Field(4, FIXED32, b"1234"),
        Field(5, FIXED64, b"12345678"),
    ]
    assert criu_format.parse(criu_format.build(fields)) == fields


@pytest.mark.parametrize("raw", [b"\x08", b"\x0a\x05ab", b"\x0b", b"\x08" + b"\xff" * 11])
def test_no_message(raw: bytes) -> None:
    with pytest.raises(Damaged):
        criu_format.parse(raw)


def test_statistics(tmp_path: Path) -> None:
    # as CRIU 4.2.1 wrote them
    raw = bytes.fromhex(
        "405910550633095723000000"
        "0a21085c10dc3a188e1920a9122 8a10e300038be0d4000480050085808600068007000".replace(" ", "")
    )
    (tmp_path / "stats-dump").write_bytes(raw)
    stats = criu_images.dump_stats(tmp_path)
    assert (stats.freezing_ms, stats.frozen_ms) == (0.092, 7.516)
    assert (stats.memdump_ms, stats.memwrite_ms) == (3.214, 2.345)
    assert (stats.pages_scanned, stats.pages_written) == (1825, 1726)
    (tmp_path / "stats-dump").write_bytes(raw[:20])
    with pytest.raises(Damaged, match="cut off"):
        criu_images.dump_stats(tmp_path)
    (tmp_path / "stats-dump").unlink()
    with pytest.raises(Damaged, match="is missing"):
        criu_images.dump_stats(tmp_path)


def test_which_ids_a_restore_takes(tmp_path: Path) -> None:
    root = [varint(1, 10), varint(2, 0), varint(3, 10), varint(4, 5), varint(5, 10), varint(5, 11)]
    child = [varint(1, 12), varint(2, 10), varint(3, 13), varint(4, 5), varint(5, 12)]
    zombie = [varint(1, 14), varint(2, 10), varint(3, 0), varint(4, 2507382304), varint(5, 14)]
    image(tmp_path / "pstree.img", PSTREE, root, child, zombie)
    shape = criu_images.shape(tmp_path)
    assert shape.root == 10 and not shape.is_session_leader
    assert shape.ids == {10, 11, 12, 13, 14}, "not the session outside, nor a zombie's by chance"
    image(tmp_path / "pstree.img", FILES)
    with pytest.raises(Damaged, match="does not begin as CRIU's"):
        criu_images.shape(tmp_path)


def test_mending(tmp_path: Path) -> None:
    path = tmp_path / "files.img"
    right = [timer(0, (0, 5), (1, 2)), timer(1, (0, 0), (0, 0)), pipe(5, os.O_RDONLY)]
    image(path, FILES, *right, pipe(5, os.O_WRONLY))
    before = path.read_bytes()
    criu_images.mend(tmp_path)
    assert path.read_bytes() == before
    image(path, FILES, timer(1, (0, 0), (1, 2)), pipe(6, os.O_WRONLY), *right)
    path.chmod(0o640)
    criu_images.mend(tmp_path)
    expected = tmp_path / "expected"
    image(expected, FILES, timer(1, (1, 2), (1, 2)), pipe(6, os.O_WRONLY | os.O_APPEND), *right)
    assert path.read_bytes() == expected.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o640


PRESENT, LAZY = criu_images.PAGE_IS_PRESENT, 1 << 1
RANGES = (
    [varint(1, 0x1000), varint(2, 2), varint(4, PRESENT)],
    [varint(1, 0x9000), varint(2, 0), varint(4, PRESENT), varint(5, 3)],
    [varint(1, 0xF000), varint(2, 9), varint(4, LAZY)],
    [varint(1, 0x20000), varint(2, 4), varint(3, 1)],
)


def test_pages_that_are_not_there(tmp_path: Path) -> None:
    image(tmp_path / "pagemap-7.img", PAGEMAP, [varint(1, 1)], *RANGES)
    image(tmp_path / "pagemap-8.img", PAGEMAP, [varint(1, 2)])
    criu_images.check_pages(tmp_path, {"pages-1.img": 5 * 4096})
    for sizes in ({"pages-1.img": 5 * 4096 - 1}, {}):
        with pytest.raises(Damaged, match=r"pages-1\.img has (20479|0) bytes of 20480"):
            criu_images.check_pages(tmp_path, sizes)


def test_where_in_memory_the_pages_of_a_file_were(tmp_path: Path) -> None:
    image(tmp_path / "pagemap-7.img", PAGEMAP, [varint(1, 1)], *RANGES)
    image(tmp_path / "pagemap-8.img", PAGEMAP, [varint(1, 2)], RANGES[0])
    image(tmp_path / "pagemap-shmem-9.img", PAGEMAP, [varint(1, 2)], RANGES[1])
    addresses = criu_images.Addresses(tmp_path)
    assert addresses.pages_of("pages-1.img").tolist() == [1, 2, 9, 10, 11]
    assert addresses.pages_of("pages-2.img").tolist() == [1, 2, 9, 10, 11]
    assert addresses.pages_of("pages-3.img").tolist() == []
    assert criu_images.Addresses(tmp_path / "nowhere").pages_of("pages-1.img").tolist() == []


def test_which_files_can_have_any_size() -> None:
    assert all(map(criu_images.is_large, ("pages-1.img", "pages-shmem-5.img", "ghost-file-a.img")))
    small = ("pagemap-1.img", "core-1.img", "ghost-1.img", "files/pages-1.img", "manifest.json")
    assert not any(map(criu_images.is_large, small))


def restored(images: Path, lazy: bool = False, **of: bool) -> list[tuple[str, ...]]:
    root = [varint(1, 10), varint(2, 0), varint(3, 10), varint(4, 10), varint(5, 10)]
    image(images / "pstree.img", PSTREE, root)
    facts_ = [varint(criu_images.INVENTORY_TCP_CLOSE, 1)] if of.get("closed_tcp") else []
    image(images / "inventory.img", (criu_images.INVENTORY_MAGIC,), [varint(1, 2), *facts_])
    substitutes = [Substitute(100, "pipe:[6]", "a")]
    found = criu_options.for_restore(images, Path("/work"), Path("/pid"), substitutes, lazy)
    assert all(option.reason for option in found)
    return [option.words for option in found]


def test_every_restore(tmp_path: Path) -> None:
    words = restored(tmp_path)
    assert ("--stream",) in words and ("--images-dir", str(tmp_path)) in words
    assert ("--restore-detached",) in words and ("--pidfile", "/pid") in words
    assert ("--inherit-fd", "fd[100]:pipe:[6]") in words
    assert not {"--shell-job", "--tcp-close", "--lazy-pages"} & {w[0] for w in words}
    assert ("--tcp-close",) in restored(tmp_path, closed_tcp=True)


def test_a_lazy_restore_is_fed_and_not_streamed(tmp_path: Path) -> None:
    words = restored(tmp_path, lazy=True)
    assert ("--lazy-pages",) in words and ("--stream",) not in words


def test_substitutes(tmp_path: Path) -> None:
    image(
        tmp_path / "files.img",
        FILES,
        pipe(6, os.O_WRONLY),
        pipe(6, os.O_WRONLY),
        pipe(5, os.O_WRONLY),
        pipe(5, os.O_RDONLY),
        pipe(4, os.O_RDONLY),
    )
    ends = (
        end("unix", "unix[9]", 0),
        end("unix", "unix[8]", 0),
        end("unix", "unix[8]", 1),
        end("unix", "unix[7]", 5),
        end("tty", "tty[8803:19]", 0),
    )
    assert criu_options.substitutes(tmp_path, ends) == [
        Substitute(100, "pipe:[6]", "a"),
        Substitute(101, "socket:[9]", "r"),
        Substitute(102, "socket:[8]", "a"),
    ]


# -- connections


def inet(inode: int, own: tuple[list[int], int], peer: tuple[list[int], int]) -> list[Field]:
    addresses = [varint(11, each) for each in own[0]] + [varint(12, each) for each in peer[0]]
    ports = [varint(7, own[1]), varint(8, peer[1])]
    return file_entry(criu_network.FILE_INET, [varint(1, 1), varint(2, inode), *ports, *addresses])


LOCAL4 = [struct.unpack("=I", bytes((127, 0, 0, 1)))[0]]
LOCAL6 = list(struct.unpack("=4I", bytes(15) + b"\x01"))
MAPPED = [0, 0, *struct.unpack("=I", b"\0\0\xff\xff"), *LOCAL4]


def test_connections_of_an_image(tmp_path: Path) -> None:
    listener = inet(0xA0, (LOCAL4, 80), (LOCAL4, 0))
    sockets = (
        inet(0xA1, (LOCAL4, 80), (LOCAL4, 4000)),
        inet(0xA2, (LOCAL6, 80), (LOCAL6, 4001)),
        inet(0xA3, (MAPPED, 80), (MAPPED, 4002)),
    )
    image(tmp_path / "files.img", FILES, listener, *sockets)
    assert criu_network.connections(tmp_path) == []
    for inode in (0xA1, 0xA2, 0xA3):
        (tmp_path / f"tcp-stream-{inode:x}.img").touch()
    found = criu_network.connections(tmp_path)
    assert list(map(str, found)) == [
        "127.0.0.1:80 to 127.0.0.1:4000",
        "[::1]:80 to [::1]:4001",
        "127.0.0.1:80 to 127.0.0.1:4002",
    ]
    rules = criu_network.rules("3104d1cb-d0d5-4faa-aef4-1f4cee5c7a3d", found)
    assert "table inet CRIU-3104d1cb-d0d5-4faa-ae {" in rules, "31 bytes with `inet `, as CRIU's"
    assert "127.0.0.1 . 80 . 127.0.0.1 . 4000, 127.0.0.1 . 4000 . 127.0.0.1 . 80" in rules
    assert "::1 . 4001 . ::1 . 80" in rules


@pytest.mark.parametrize(("family", "address"), [("AF_INET", "127.0.0.1"), ("AF_INET6", "::1")])
def test_a_connection_that_somebody_has(family: str, address: str) -> None:
    with socket.socket(getattr(socket, family)) as listener:
        listener.bind((address, 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as ours:
            one, other = (
                criu_network.End(ipaddress.ip_address(name[0]), name[1])
                for name in (ours.getsockname(), ours.getpeername())
            )
            mine = criu_network.Connection(one, other)
            never = criu_network.Connection(one, one)
            assert criu_network.held([never, mine]) == mine
            assert criu_network.held([never]) is None


# -- words


FD = (
    "(00.031596) Dumping opened files (pid: 4242)\n"
    "(00.031629) 4242 fdinfo 0: pos:                0 flags:           100002/0\n"
    "(00.031642) Dumping path for 0 fd via self 12 [/dev/null]\n"
    "(00.031683) 4242 fdinfo 7: pos:                0 flags:                2/0\n"
)
PATH = FD + "(00.041749) Dumping path for 7 fd via self 17 [/data/f1 (deleted)]\n"
ECHO = (
    "(00.031704) Error (criu/cr-dump.c:1545): Dump files (pid: 4242) failed with -1\n"
    "(00.034000) Error (criu/cr-dump.c:1975): Dumping FAILED.\n"
)
HARMLESS = (
    "(00.020757) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: "
    "Operation not permitted\n"
)
ZOMBIE = (
    "(00.046924) Warn  (compel/src/lib/infect.c:132): Unable to interrupt task: 7385 "
    "(Operation not permitted)\n"
)

# Errors as CRIU 4.2.1 wrote them: where in its source, its words, what becomes of it.
DUMP_ERRORS = [
    (FD, "sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.",
     Unsupported, "fd 7 of task 4242 is an established TCP connection; write tcp=keep"),
    (FD, "sk-inet.c:185): inet: In-flight connection (l) for 345fe",
     TryAgain, "waiting to be accepted on fd 7 of task 4242"),
    (FD, "sk-inet.c:137): inet: Unsupported proto 262 for socket 3553c", Unsupported, "Multipath"),
    (FD, "sockets.c:767): sockets: BUG! Unknown socket collected (family 40)",
     Unsupported, "fd 7 of task 4242 is a socket of family 40"),
    (FD, "sk-netlink.c:77): netlink: The socket has data to read", TryAgain, "netlink"),
    (PATH, "files-reg.c:1122): Can't create link remap for /data/f1. Use link-remap option.",
     Unsupported, r"fd 7 \(/data/f1\) of task 4242 was deleted under that name"),
    (PATH, "files-reg.c:1031): Can't dump ghost file /data/f1 of 2002944 size, increase limit",
     Unsupported, "is deleted and has 2002944 bytes"),
    (FD, "files-ext.c:94): Can't dump file 7 of that type [600] (anon anon_inode:[userfaultfd])",
     Unsupported, r"fd 7 of task 4242 .* \(anon anon_inode:\[userfaultfd\]\)"),
    (FD, "files-reg.c:1790): Can't lookup mount=18 for fd=3 path=/memfd:h (deleted)",
     Unsupported, "memfd of huge pages"),
    (FD, "files-reg.c:1790): Can't lookup mount=18 for fd=7 path=/media/x",
     Unsupported, "on a mount that the tree does not see .*/media/x"),
    (FD, "pidfd.c:97): pidfd: pidfd pid 1 is not a part of process tree..",
     Unsupported, "pidfd of process 1"),
    ("", "cr-dump.c:478): Task 28939 with SysVIPC shmem map @7f9407741000 doesn't live in IPC ns",
     Unsupported, "task 28939 uses System V shared memory"),
    ("", "namespaces.c:460): Can't dump nested uts namespace for 29196",
     Unsupported, "task 29196 is in a uts namespace of its own"),
    ("", "cr-dump.c:389): Can't get rlimit 0: Operation not permitted",
     Unsupported, "CAP_SYS_RESOURCE"),
    (FD, "pie/parasite.c:588): send_fds failed (-22)", Unsupported, "task 4242 .* io_uring"),
    ("", "sk-unix.c:881): unix: Can't dump half of stream unix connection. name: (null); peer "
     "name: (null)", Unsupported, "connected to a process outside"),
    ("", "tty.c:419): tty: Only one slave external peer is allowed (index 3)",
     Unsupported, "several terminals"),
    ("", "seize.c:600): Unable to freeze cgroup /x (100 x 100ms attempts, timeout: 10s)",
     TryAgain, "did not come to rest"),
    ("", "image.c:500): Can't write to /x/pages-1.img: No space left on device", NoRoom, "no room"),
    ("", "infect.c:155): 4242 was killed by 9 unexpectedly: Killed",
     TryAgain, "task 4242 was killed by 9 while"),
]  # fmt: skip
RESTORE_ERRORS = [
    ("cr-restore.c:1237): Can't fork for 31226: File exists", Exists, "pid 31226 is taken"),
    ("files-reg.c:2175): File tmp/f1 has bad size 5 (expect 1)",
     CannotRunHere, "/tmp/f1 has 5 bytes and had 1"),
    ("files-reg.c:2353): Can't open file tmp/f1 on restore: No such file or directory",
     CannotRunHere, "/tmp/f1 cannot be opened: No such file or directory"),
    ("files-reg.c:2294): File tmp/f1 has bad mode 0100600 (expect 0100644)",
     CannotRunHere, "/tmp/f1 has mode 0100600"),
    ("sk-inet.c:1059): inet: Can't bind inet socket (id 31): Address already in use",
     Exists, "ss -ltnp"),
    ("sk-unix.c:1651): unix: Can't bind id 0x1f ino 231424 addr : Address already in use",
     Exists, "unix sockets"),
    ("tty.c:1010): tty: Don't have tty to inherit session from, aborting",
     CannotRunHere, "needs a terminal"),
    ("protobuf.c:93): Read 3 bytes while 18 expected from /i/pstree.img: Operation not permitted",
     Damaged, "pstree.img"),
    ("y.c:887): Can't restore not-sent send queue data (-1), want (0-892:892:892): Broken pipe",
     TryAgain, "reset by a packet"),
    ("protobuf.c:72): Unexpected EOF on (empty-image)", Damaged, "missing or not whole"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "error", "kind", "words"), DUMP_ERRORS)
def test_complaints_of_a_dump(before: str, error: str, kind: type[KrgError], words: str) -> None:
    log = f"{HARMLESS}{ZOMBIE}{before}(00.031689) Error (criu/{error}\n{ECHO}"
    found = criu_words.explain(log)
    assert found.kind is kind
    with pytest.raises(KrgError, match=words):
        raise KrgError(found.sentence)
    assert found.lines[0].endswith(error), "what is harmless is no error"


@pytest.mark.parametrize(("error", "kind", "words"), RESTORE_ERRORS)
def test_complaints_of_a_restore(error: str, kind: type[KrgError], words: str) -> None:
    log = f"(00.024844)  31118: Error (criu/{error}\n(0) Error (criu/x.c:1): Restoring FAILED.\n"
    found = criu_words.explain(log)
    assert (found.kind, words in found.sentence) == (kind, True), found.sentence


def test_the_first_error_counts_but_for_a_full_disk() -> None:
    first = "(0) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using x\n"
    full = "(0) Error (criu/bfd.c:1): Can't write: No space left on device\n"
    netlink = "(0) Error (criu/sk-netlink.c:77): netlink: The socket has data to read\n"
    assert criu_words.explain(first + netlink).kind is Unsupported
    assert criu_words.explain(netlink + first).kind is TryAgain
    assert criu_words.explain(first + full).kind is NoRoom


def test_a_warning_counts_where_no_error_is_known() -> None:
    found = criu_words.explain(ZOMBIE + ECHO)
    assert found.kind is Unsupported and "task 7385 cannot be traced" in found.sentence


def test_pids_are_told_as_the_reader_knows_them() -> None:
    log = f"{FD}(0) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using x\n"
    assert "fd 7 of task 99" in criu_words.explain(log, {4242: 99}).sentence


def test_an_unknown_error_is_told_in_its_own_words() -> None:
    log = f"{FD}(0) Error (criu/new.c:1): mod: Cannot frobnicate 5\n{ECHO}"
    found = criu_words.explain(log)
    assert (found.kind, found.sentence) == (EngineFailed, "mod: Cannot frobnicate 5")
    assert "no error" in criu_words.explain("").sentence


def test_what_matters_comes_first() -> None:
    log = f"(0) one\n{HARMLESS}{ZOMBIE}(0) two\n{ECHO}"
    lines = criu_words.lines_that_matter(log)
    assert lines[:3] == [*ECHO.splitlines(), ZOMBIE.strip()]
    assert lines[3:] == log.splitlines()


def test_frozen_so_far() -> None:
    log = "(00.01) a\n(00.020000) Seized task 5, state 1\npie: 5: x\n(00.031000) Running scripts\n"
    assert criu_words.frozen_ms_so_far(log) == pytest.approx(11.0)
    assert criu_words.frozen_ms_so_far("") == 0.0


# -- the engine


def fake(path: Path, version: str) -> str:
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Version: {version}"\n')
    path.chmod(0o755)
    return str(path)


async def test_which_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = fake(tmp_path / "criu", "3.17.1"), fake(tmp_path / "newer", "4.10")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KRG_CRIU", raising=False)
    found = await criu.Engine.find(fetched=new)
    assert (found.path, found.version) == (new, "4.10"), "the one on PATH is too old"
    with pytest.raises(EngineFailed, match=r"criu is 3\.17\.1; run contrib/fetch-criu"):
        await criu.Engine.find(old)
    monkeypatch.setenv("KRG_CRIU", str(tmp_path / "none"))
    with pytest.raises(EngineFailed, match="no CRIU that starts here"):
        await criu.Engine.find()
    monkeypatch.setenv("KRG_CRIU", new)
    assert (await criu.Engine.find(fetched=old)).path == new


async def test_words_are_kept(tmp_path: Path) -> None:
    into, kept = tmp_path / "v1", tmp_path / "7.log.zst"
    into.mkdir()
    work = criu.work_dir(into)
    work.mkdir()
    (work / "dump.log").write_text(f"(0) one\n{ECHO}")
    said = await criu.kept_words(into, str(kept))
    assert said.splitlines()[0] == ECHO.splitlines()[0]
    assert kept.stat().st_mode & 0o777 == 0o600
    assert not work.exists()
    nowhere = str(tmp_path / "no" / "log")
    work.mkdir()
    (work / "dump.log").write_text("(0) one\n")
    assert await criu.kept_words(into, nowhere) == "(0) one\n", (
        "no room for them is no reason to fail"
    )


# -- an engine at work


async def test_an_engine_is_watched_until_its_end_and_its_code_told(tmp_path: Path) -> None:
    fifo, watched = tmp_path / "fifo", trio.Event()
    os.mkfifo(fifo)
    told: list[tuple[int, int]] = []

    async def started(pid: int, start: int) -> None:
        told.append((pid, start))

    async def watch() -> None:
        fifo.write_text("go\n")  # so its end comes after this
        watched.set()
        await trio.sleep_forever()

    command = ["sh", "-c", f"echo said; read x < {fifo}; exit 5"]
    code = await criu_run.run(command, tree(), tmp_path, started, watch, pytest.fail)
    assert code == 5 and watched.is_set()
    assert (tmp_path / criu_run.SAID).read_text() == "said\n"
    assert len(told) == 1 and told[0][0] > 0


async def test_an_engine_is_made_to_give_up_and_never_ended(tmp_path: Path) -> None:
    fifo, given_up = tmp_path / "fifo", []
    os.mkfifo(fifo)

    def give_up() -> None:
        given_up.append(True)
        fifo.write_text("enough\n")

    async def cancel(pid: int, start: int) -> None:
        scope.cancel()

    with trio.CancelScope() as scope:
        command = ["sh", "-c", f"read x < {fifo}; exit 7"]
        code = await criu_run.run(command, tree(), tmp_path, cancel, trio.sleep_forever, give_up)
        assert (code, given_up) == (7, [True])
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_what_stops_us_from_telling_is_raised_at_the_end(tmp_path: Path) -> None:
    async def started(pid: int, start: int) -> None:
        raise EngineFailed("no journal")

    watch = trio.sleep_forever
    with pytest.raises(EngineFailed, match="no journal"):
        await criu_run.run(["true"], tree(), tmp_path, started, watch, pytest.fail)
