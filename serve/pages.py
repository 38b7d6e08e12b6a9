"""The books of the KV cache: whose each page is, which are free, and which hold a beginning that others may share.

Nothing here touches a device. The device runs what it is given in order, so a page may be given away as soon as nobody
needs it: what was enqueued before still finds it as it was.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

PAGE = 64
"""Tokens of a page: what the kernels fetch at a time."""

SCRATCH = 0
"""Page that nobody owns: what padding and idle slots write goes there, and so do table entries without a page."""


@dataclasses.dataclass(kw_only=True)
class _Sequence:
    """What a slot holds: its pages in order, the tokens whose keys they have, and the name of the last full page.

    `uncompensated` counts the tokens of the page being filled that went without some compensators.
    """

    pages: list[int]
    tokens: list[int]
    name: bytes = b""
    uncompensated: int = 0


class PagePool:
    """Pages for the sequences of S slots; the first is nobody's.

    A full page has a name made of the name of the page before, its tokens, and whether some of them went without some
    error compensators. A request may begin with pages of that name; those computed without compensators are only for
    requests that allow it. Only full pages are shared, so none is written that another reads. Pages that nobody holds
    keep their name until they are needed, the least recently used first.
    """

    def __init__(self, *, pages: int, table: tuple[int, int], prefix_caching: bool = True):
        if pages < 2:
            raise ValueError(f"a KV cache needs two pages or more, one of them nobody's, got {pages}")
        self.table = np.full(table, SCRATCH, np.int32)
        self.changed = True
        self._prefix_caching = prefix_caching
        self._root = b""
        self._free = list(range(pages - 1, SCRATCH, -1))
        self._references = np.zeros(pages, np.int64)
        self._uncompensated = np.zeros(pages, np.int64)
        self._names: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # named pages that nobody holds, least recently used first
        self._slots: dict[int, _Sequence] = {}

    @property
    def total(self) -> int:
        """Pages that sequences can have."""
        return len(self._references) - 1

    @property
    def available(self) -> int:
        """Pages that can be given out now."""
        return len(self._free) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold."""
        return 1 - self.available / self.total

    def begin(
        self,
        slot: int,
        tokens: Sequence[int],
        *,
        room: int,
        spare: int = 0,
        shared: bool = True,
        droppable: bool = True,
    ) -> tuple[int, int] | None:
        """Give a slot pages for `room` tokens, if `spare` pages are left then; None if there are too few.

        It will hold `tokens`, and perhaps more. With `shared` it begins with the pages that are known already, but that
        of the last token, which must be computed again. Gives how many tokens these have, and how many of them went
        without some compensators.
        """
        found, name = self._known(tokens, droppable=droppable) if shared else ([], self._root)
        idle = sum(page in self._idle for page in found)
        if self.available - idle < pages_for(room) - len(found) + spare:
            return None
        for page in found:
            self._idle.pop(page, None)
            self._references[page] += 1
        assert slot not in self._slots
        self._slots[slot] = _Sequence(pages=list(found), tokens=list(tokens[: len(found) * PAGE]), name=name)
        self.table[slot, : len(found)] = found
        self.changed = True
        self.reserve(slot, room)
        return len(found) * PAGE, int(self._uncompensated[found].sum())

    def reserve(self, slot: int, tokens: int) -> bool:
        """See that a slot has pages for so many tokens; False, and nothing changes, where there are too few."""
        held = self._slots[slot].pages
        missing = pages_for(tokens) - len(held)
        if missing > self.available:
            return False
        for _ in range(missing):
            page = self._take()
            self.table[slot, len(held)] = page
            held.append(page)
            self.changed = True
        return True

    def length(self, slot: int) -> int:
        """Give the number of a slot's tokens whose keys are written, or will be by what has been enqueued."""
        return len(self._slots[slot].tokens)

    def written(self, slot: int, tokens: Sequence[int], *, uncompensated: bool = False) -> None:
        """Say that the keys of a slot's next tokens are written, or will be by what has been enqueued."""
        held = self._slots[slot]
        for token in tokens:
            held.tokens.append(token)
            held.uncompensated += uncompensated
            if len(held.tokens) % PAGE == 0:
                self._name(held)

    def free(self, slot: int) -> None:
        """Take a slot's pages back; their last ones are the first that will be used for others."""
        for page in reversed(self._slots.pop(slot).pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._names:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        self.table[slot] = SCRATCH
        self.changed = True

    def forget(self) -> None:
        """Forget what the pages hold, of which nobody may hold any: the device has made them anew."""
        assert not self._slots
        self._free.extend(self._idle)
        for known in (self._idle, self._names, self._pages):
            known.clear()
        self.changed = True

    def renew(self) -> None:
        """Share none of what is known now, as what is computed from now on is different: the weights are others."""
        self._root = hashlib.blake2b(self._root, digest_size=16).digest()

    def _known(self, tokens: Sequence[int], *, droppable: bool) -> tuple[list[int], bytes]:
        """Give the pages that the tokens begin with, as far as they are known, and the name of the last."""
        found: list[int] = []
        name = self._root
        while self._prefix_caching and (len(found) + 1) * PAGE < len(tokens):
            part = tokens[len(found) * PAGE : (len(found) + 1) * PAGE]
            names = [_name_of(name, part, uncompensated=flag) for flag in (False, True)[: 1 + droppable]]
            name = next((one for one in names if one in self._pages), b"")
            if not name:
                break
            found.append(self._pages[name])
        return found, self._names[found[-1]] if found else self._root

    def _name(self, held: _Sequence) -> None:
        """Name the page that a sequence has just filled, unless another is called so already."""
        page = held.pages[len(held.tokens) // PAGE - 1]
        held.name = _name_of(held.name, held.tokens[-PAGE:], uncompensated=held.uncompensated > 0)
        if self._prefix_caching and held.name not in self._pages:
            self._pages[held.name], self._names[page] = page, held.name
            self._uncompensated[page] = held.uncompensated
        held.uncompensated = 0

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page], self._pages[self._names.pop(page)]
        self._references[page] = 1
        return page


def pages_for(tokens: int) -> int:
    """Give the number of pages that hold so many tokens."""
    return -(-tokens // PAGE)


def _name_of(before: bytes, tokens: Sequence[int], *, uncompensated: bool) -> bytes:
    data = np.asarray([uncompensated, *tokens], np.int64).tobytes()
    return hashlib.blake2b(data, key=before, digest_size=16).digest()
