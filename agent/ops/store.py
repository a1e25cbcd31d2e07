"""verify, sweep and diff: what is done to images where they lie, with no tree involved.

What is found goes into the job's log, a line each; the verb's file reads back how much it was.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import trio
import zstandard
from msgspec.structs import replace

from krgfs.errors import Damaged
from krgfs.model import Image, Phase

from .. import audit, compare, durable, figures
from ..audit import Damage
from ..compare import Side
from ..jobs import Running
from ..parts import Parts

NAMED = 3


async def verify(parts: Parts, job: Running, wanted: list[Image]) -> str:
    """Read every byte of these images, and mark those that are damaged, which is Damaged; returns
    how much was read. An image that was marked and is good again is marked no more."""
    total = sum(image.stored_bytes for image in wanted)
    job.phase(Phase.READING, bytes_total=total)
    told = _told(job)
    damage = []
    for image in wanted:
        found = await parts.images.audited_one(image.app, image.version, told)
        found = _mark(parts, image, found)
        _say(job, found or [f"{image.ref} ok"])
        damage += found
    return await _verdict(parts, job, len(wanted), total, damage)


async def verify_all(parts: Parts, job: Running) -> str:
    """The same with every byte of the store, of which not all need be of an image."""
    job.phase(Phase.READING, bytes_total=parts.state.room.stored_bytes)
    before = _all_images(parts)
    found = await parts.images.audited(_told(job))
    damage = []
    for image in before:
        of_it = [each for each in found.damage if each.image == image.ref]
        if not of_it and (image.ref, image.digest) not in found.whole:
            of_it = [Damage(image.ref, audit.GONE)]
        of_it = _mark(parts, image, of_it)
        _say(job, of_it or [f"{image.ref} ok"])
        damage += of_it
    known = {image.ref for image in before}
    others = [each for each in found.damage if each.image not in known]
    _say(job, [*others, *found.spare])
    read = found.report.read_bytes
    return await _verdict(parts, job, found.report.images, read, [*damage, *others], found.spare)


def _all_images(parts: Parts) -> list[Image]:
    named = sorted(parts.state.images.items())
    return [image for _, versions in named for _, image in sorted(versions.items())]


def _told(job: Running) -> Callable[[int], None]:
    """Return what to tell, in a thread, of bytes that were read; it raises when the job ends."""
    done = 0

    def told(size: int) -> None:
        nonlocal done
        done += size
        trio.from_thread.run_sync(job.progress, done)

    return told


def _mark(parts: Parts, image: Image, damage: list[Damage]) -> list[Damage]:
    """Show an image as damaged or not; returns the damage, none where it was removed meanwhile."""
    current = parts.state.images.get(image.app, {}).get(image.version)
    if current is None or current.digest != image.digest:
        return []
    chunks: dict[str, list[str]] = {}
    for each in damage:
        chunks.setdefault(each.file, []).append(each.chunk)
    wrong = [
        f"{file} is damaged ({len(hit)} chunks, among them {hit[0][:16]})"
        if file
        else damage[0].why
        for file, hit in chunks.items()
    ]
    text = "; ".join(wrong[:NAMED])
    if text != current.damaged:
        parts.state.show(replace(current, damaged=text))
    return damage


def _say(job: Running, lines: Iterable[object]) -> None:
    job.said += "".join(f"{line}\n" for line in lines)


async def _verdict(
    parts: Parts,
    job: Running,
    images: int,
    read_bytes: int,
    damage: list[Damage],
    spare: Iterable[Damage] = (),
) -> str:
    await _keep(parts, job)
    await figures.show(parts)
    log = f"jobs/{job.id}/log names file and chunk"
    if damage:
        hit = sorted({each.image for each in damage})
        some = ", ".join(hit[:NAMED]) + (" ..." if len(hit) > NAMED else "")
        raise Damaged(f"{len(hit)} of {images} images are damaged: {some}; {log}")
    if spare:
        raise Damaged(f"the image store is damaged where no image needs it; {log}")
    return f"verified {images} bytes {read_bytes} log jobs/{job.id}/log"


async def _keep(parts: Parts, job: Running) -> None:
    """Keep what was said, for jobs/ID/log after the end of the job."""

    def keep() -> None:
        with (
            contextlib.suppress(OSError),  # the verdict counts more
            open(parts.job_log(job.id), "wb", opener=_private) as file,
        ):
            file.write(zstandard.compress(job.said.encode(errors="surrogateescape")))

    await trio.to_thread.run_sync(keep)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


async def diff(parts: Parts, job: Running, before: Image, after: Image) -> str:
    """Say in the job's log what changed from one image to another; returns how much."""
    job.phase(Phase.READING)
    sides = [await parts.images.opened(each.app, each.version) for each in (before, after)]
    path = parts.images.places.spool(job.id)
    paths = [os.path.join(path, name) for name in ("before", "after")]
    told = _told(job)

    def work() -> list[str]:
        old, new = (Side(side, Path(where)) for side, where in zip(sides, paths, strict=True))
        return list(compare.differences(old, new, told))

    await durable.run("cannot compare", partial(os.mkdir, path, 0o700))
    try:
        for side, where in zip(sides, paths, strict=True):
            os.mkdir(where, 0o700)
            await parts.images.unpacked(side, where)
        try:
            lines = await durable.run(f"cannot compare {before.ref} and {after.ref}", work)
        except Damaged as exc:  # where its files lie is the agent's own business
            text = exc.message.replace(paths[0], before.ref).replace(paths[1], after.ref)
            raise Damaged(f"cannot compare {before.ref} and {after.ref}: {text}") from exc
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(durable.delete, path)
    _say(job, lines)
    await _keep(parts, job)
    return f"{lines[-1]} log jobs/{job.id}/log"


async def sweep(parts: Parts, job: Running) -> str:
    """Remove from the store what no image needs; returns what was freed."""
    job.phase(Phase.READING)
    swept = [await parts.images.sweep()]
    if swept[0].condemned_chunks:  # they may go at once, where nobody else writes
        swept.append(await parts.images.sweep())
    first, last = swept[0], swept[-1]
    _say(job, last.kept)
    await _keep(parts, job)
    await figures.show(parts)
    waiting = len(last.waiting) + bool(last.condemned_chunks)
    return (
        f"freed {sum(each.freed_bytes for each in swept)} "
        f"packs {sum(each.removed_packs for each in swept)} "
        f"rewritten {sum(each.rewritten_packs for each in swept)} "
        f"condemned {first.condemned_chunks} waiting {waiting}"
    )
