"""The page allocator against a plain count of holders, whatever is asked of it in whatever order."""

from __future__ import annotations

import doctest
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from turbos.engine import layout, pages, pool
from turbos.engine.pages import PageAllocator

NUM_PAGES = 7


@pytest.mark.parametrize("module", [pages, layout, pool], ids=lambda module: module.__name__)
def test_examples(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 2 and result.failed == 0


class Pages(RuleBasedStateMachine):
    """Random holders: `held` is the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.held: Counter[int] = Counter()

    @rule()
    def alloc(self) -> None:
        page = self.allocator.alloc()
        if len(+self.held) == NUM_PAGES:
            assert page is None
            return
        assert page is not None and self.held[page] == 0
        assert page == min(set(range(NUM_PAGES)) - set(+self.held)), "the lowest free page goes first"
        self.held[page] = 1

    @precondition(lambda self: +self.held)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(+self.held)))
        self.allocator.retain(page)
        self.held[page] += 1

    @precondition(lambda self: +self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(+self.held)))
        self.held[page] -= 1
        assert self.allocator.release(page) == (self.held[page] == 0)

    @rule(page=st.integers(0, NUM_PAGES - 1))
    def misuse(self, page: int) -> None:
        if self.held[page] == 0:
            for act in (self.allocator.release, self.allocator.retain):
                with pytest.raises(ValueError, match=f"page {page} is free"):
                    act(page)

    @invariant()
    def counts_agree(self) -> None:
        assert [self.allocator.count(page) for page in range(NUM_PAGES)] == [self.held[p] for p in range(NUM_PAGES)]
        assert self.allocator.free == NUM_PAGES - len(+self.held)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_no_pages_at_all() -> None:
    allocator = PageAllocator(0)
    assert allocator.alloc() is None and allocator.free == 0
