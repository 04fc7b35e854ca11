"""Page ids and who holds them: every page of keys and values has a count of its holders, and is free at zero.

It hands out numbers only: the tensors belong to the pool, and which tokens lie on a page is known by who holds it. The
lowest free page goes first, so that one long sequence lies in one run and memory that was never needed stays untouched.

>>> allocator = PageAllocator(2)
>>> page = allocator.alloc()
>>> allocator.retain(page)
>>> allocator.release(page), allocator.release(page), allocator.free
(False, True, 2)
"""

from __future__ import annotations

import heapq

PAGE = 64
"""Tokens on a page."""


class PageAllocator:
    """Counts of holders over pages `0 .. num_pages - 1`; not safe for several threads."""

    def __init__(self, num_pages: int) -> None:
        """All pages free."""
        self._counts = [0] * num_pages
        self._free = list(range(num_pages))

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    @property
    def num_pages(self) -> int:
        """How many pages there are."""
        return len(self._counts)

    def alloc(self) -> int | None:
        """A page that nobody held, held once from here on; None where all are held."""
        if not self._free:
            return None
        page = heapq.heappop(self._free)
        self._counts[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One holder more of a page that is held."""
        self._check_held(page)
        self._counts[page] += 1

    def release(self, page: int) -> bool:
        """One holder less; whether the page is free by that."""
        self._check_held(page)
        self._counts[page] -= 1
        if self._counts[page]:
            return False
        heapq.heappush(self._free, page)
        return True

    def count(self, page: int) -> int:
        """How many hold a page."""
        return self._counts[page]

    def _check_held(self, page: int) -> None:
        if self._counts[page] < 1:
            raise ValueError(f"page {page} is free: it was released once too often")
