"""Files of images read by handles: who reads on and on finds the next pieces under way already.

There are no tasks: the agent is asked for pieces before they are wanted, and its answers wait.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from . import wire
from .client import Asked, Client
from .errors import KrgError
from .model import Caller

PIECE_BYTES = wire.MAX_DATA
PIECES = 3  # under way or being read, of one reader
MOST_READERS = 32  # that have pieces; whoever has not read for longest loses them


class _Piece:
    """Some bytes at an offset that the agent was asked for."""

    def __init__(self, client: Client, offset: int, asked: Asked) -> None:
        self.offset = offset
        self._client = client
        self._asked = asked
        self._data: bytes | None = None

    async def data(self) -> bytes:
        if self._data is None:
            answer = await self._client.answer(self._asked)
            self._data = answer.data
        return self._data

    def drop(self) -> None:
        self._client.drop(self._asked)


class Reader:
    """One file of a committed image, which never changes, read through one handle."""

    def __init__(
        self,
        client: Client,
        readers: OrderedDict[Reader, None],
        caller: Caller,
        names: tuple[str, str, str],
    ) -> None:
        self._client, self._readers = client, readers
        self._caller, self._names = caller, names
        self._pieces: deque[_Piece] = deque()
        self._next = -1  # where a read begins that goes on from the one before
        self._end: int | None = None  # of the file, once it was seen
        self.is_busy = False

    async def read(self, offset: int, size: int) -> bytes:
        """Return the bytes there, fewer at the end of the file, or where what follows cannot be
        read: it is the next read that raises why."""
        if self._end is not None and offset >= self._end:
            return b""
        if self.is_busy:  # several threads read by one descriptor
            return await self._alone(offset, size)
        self.is_busy = True
        try:
            goes_on = offset == self._next
            if not goes_on:
                self.drop()
            data = await (self._going_on(offset, size) if goes_on else self._alone(offset, size))
            self._next = offset + len(data)
            return data
        except BaseException:
            self.drop()
            raise
        finally:
            self.is_busy = False

    def drop(self) -> None:
        """Forget what is under way."""
        self._readers.pop(self, None)
        self._next = -1
        while self._pieces:
            self._pieces.pop().drop()

    async def _alone(self, offset: int, size: int) -> bytes:
        size = min(size, PIECE_BYTES)
        data: bytes = (await self._client.answer(await self._ask(offset, size))).data
        self._seen(offset, len(data), size)
        return data

    async def _going_on(self, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        end = offset + size
        while offset < end and (self._end is None or offset < self._end):
            await self._look_ahead(offset)
            piece = self._pieces[0]
            try:
                data = await piece.data()
            except KrgError:
                if not parts:
                    raise
                self.drop()
                break
            self._seen(piece.offset, len(data), PIECE_BYTES)
            parts.append(data[offset - piece.offset : end - piece.offset])
            offset += len(parts[-1])
            if offset == piece.offset + len(data):
                self._pieces.popleft().drop()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _seen(self, offset: int, count: int, asked: int) -> None:
        if count < asked:
            self._end = min(offset + count, self._end or offset + count)

    async def _look_ahead(self, offset: int) -> None:
        """Have pieces under way from `offset` on."""
        self._readers[self] = None
        self._readers.move_to_end(self)
        for idle in [each for each in self._readers if not each.is_busy]:
            if len(self._readers) <= MOST_READERS:
                break
            idle.drop()
        at = self._pieces[-1].offset + PIECE_BYTES if self._pieces else offset
        while len(self._pieces) < PIECES and (self._end is None or at < self._end):
            self._pieces.append(_Piece(self._client, at, await self._ask(at, PIECE_BYTES)))
            at += PIECE_BYTES

    async def _ask(self, offset: int, size: int) -> Asked:
        app, name, file = self._names
        return await self._client.ask(
            wire.ReadFile, self._caller, app=app, name=name, file=file, offset=offset, size=size
        )
