"""The books of pages: none is lost, none is given to two who write, and beginnings are found again."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.pages import PAGE, SCRATCH, PagePool, pages_for


def filled(pool: PagePool, slot: int, tokens: list[int], **options: bool) -> int:
    """Give a slot pages for tokens, and write those that are not there; give how many were."""
    begun = pool.begin(slot, tokens, room=len(tokens) + 1, **options)
    assert begun is not None
    pool.written(slot, tokens[begun[0] :])
    return begun[0]


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, length).tolist()


def test_a_beginning_is_found_up_to_the_last_full_page_before_the_last_token() -> None:
    pool, tokens = PagePool(pages=20, table=(3, 8)), prompt(3 * PAGE)
    assert filled(pool, 0, tokens) == 0
    assert filled(pool, 1, tokens) == 2 * PAGE  # the last token must be computed again
    assert pool.table[0, :2].tolist() == pool.table[1, :2].tolist()
    assert pool.table[0, 2] != pool.table[1, 2]
    pool.free(0)
    pool.free(1)
    assert pool.available == pool.total
    assert not pool.table.any()
    assert filled(pool, 2, [*tokens, 1]) == 3 * PAGE
    assert filled(pool, 0, [*tokens[:PAGE], *tokens[:PAGE]]) == PAGE
    pool.free(0)
    assert filled(pool, 0, [tokens[0] + 1, *tokens[1:]]) == 0
    assert filled(pool, 1, tokens, shared=False) == 0


def test_tokens_that_were_generated_are_found_too() -> None:
    pool, tokens = PagePool(pages=20, table=(2, 8)), prompt(2 * PAGE)
    pool.begin(0, tokens[:PAGE], room=PAGE + 1)
    pool.written(0, tokens[:PAGE])
    assert pool.reserve(0, 2 * PAGE)
    for token in tokens[PAGE:]:
        pool.written(0, [token])
    assert filled(pool, 1, [*tokens, 7]) == 2 * PAGE


def test_pages_computed_without_compensators_are_for_those_who_allow_it() -> None:
    pool, tokens = PagePool(pages=30, table=(4, 8)), prompt(3 * PAGE)
    pool.begin(0, tokens, room=len(tokens))
    pool.written(0, tokens[:PAGE])
    pool.written(0, tokens[PAGE : PAGE + 10], uncompensated=True)
    pool.written(0, tokens[PAGE + 10 :])
    longer = [*tokens, 1]
    assert pool.begin(1, longer, room=len(longer), droppable=False) == (PAGE, 0)
    assert pool.begin(2, longer, room=len(longer)) == (3 * PAGE, 10)
    # Its third page has all compensators, but what it was computed from has not: another's must not have its name.
    pool.written(1, longer[PAGE:])
    assert pool.begin(3, longer, room=len(longer), droppable=False) == (3 * PAGE, 0)
    assert pool.table[3, 2] == pool.table[1, 2] != pool.table[0, 2]


def test_what_was_not_used_for_longest_goes_first() -> None:
    pool = PagePool(pages=5, table=(3, 4))
    for seed in (1, 2):
        filled(pool, 0, prompt(2 * PAGE - 1, seed))
        pool.free(0)
    filled(pool, 0, prompt(2 * PAGE - 1, 1))  # used again: the other is older
    pool.free(0)
    filled(pool, 1, prompt(3 * PAGE - 1, 3))  # takes two pages that are free and one that has a name
    pool.free(1)
    assert filled(pool, 0, prompt(PAGE + 1, 1)) == PAGE
    pool.free(0)
    assert filled(pool, 0, prompt(PAGE + 1, 2)) == 0


def test_too_few_pages_change_nothing() -> None:
    pool = PagePool(pages=4, table=(2, 4))
    filled(pool, 0, prompt(PAGE))
    before = pool.table.copy()
    assert pool.begin(1, prompt(PAGE), room=PAGE + 1) is None
    assert pool.begin(1, prompt(5, 1), room=PAGE, spare=1) is None
    assert not pool.reserve(0, 4 * PAGE)
    np.testing.assert_array_equal(pool.table, before)
    assert pool.available == 1
    assert pool.begin(1, prompt(5, 1), room=PAGE) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), pages=st.integers(3, 20), caching=st.booleans())
def test_whatever_happens_each_page_is_free_or_known_or_held(seed: int, pages: int, caching: bool) -> None:
    """Slots come, grow and go at random; what each reads through its table is what it wrote or what it found."""
    rng = np.random.default_rng(seed)
    pool = PagePool(pages=pages, table=(4, 6), prefix_caching=caching)
    memory = np.full((pages, PAGE), -1)
    held: dict[int, list[int]] = {}

    def write(slot: int, tokens: list[int]) -> None:
        for token in tokens:
            place = len(held[slot])
            number = pool.table[slot, place // PAGE]
            assert number != SCRATCH
            memory[number, place % PAGE] = token
            held[slot].append(token)
        pool.written(slot, tokens)

    for _ in range(150):
        slot = int(rng.integers(4))
        if slot not in held:
            tokens = [*prompt(200, int(rng.integers(2)))[: rng.integers(1, 200)], int(rng.integers(5))]
            available = pool.available
            begun = pool.begin(slot, tokens, room=len(tokens) + 1)
            if begun is None:
                assert pool.available == available < pages_for(len(tokens) + 1)
                continue
            assert caching or begun[0] == 0
            held[slot] = tokens[: begun[0]]
            write(slot, tokens[begun[0] :])
        elif rng.random() < 0.3:
            pool.free(slot)
            del held[slot]
        else:
            more = int(rng.integers(1, 40))
            if len(held[slot]) + more <= 6 * PAGE and pool.reserve(slot, len(held[slot]) + more):
                write(slot, rng.integers(0, 5, more).tolist())
        for other, tokens in held.items():
            assert memory[pool.table[other]].reshape(-1)[: len(tokens)].tolist() == tokens
        own = {int(page) for other in held for page in pool.table[other] if page}
        assert pool.available == pool.total - len(own)
    for slot in held:
        pool.free(slot)
    assert pool.available == pool.total
    assert pool.usage == 0


def test_what_other_weights_made_is_not_shared() -> None:
    pool = PagePool(pages=20, table=(2, 6))
    tokens = list(range(3 * PAGE + 1))
    assert filled(pool, 0, tokens) == 0
    pool.renew()
    assert filled(pool, 1, tokens) == 0
    pool.free(0)
    assert filled(pool, 0, tokens) == 3 * PAGE
