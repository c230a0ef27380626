"""Questions that are asked while others are answered are answered together, each for itself."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event

import pytest

from api.together import Ended, Together


class Oracle:
    """Doubles numbers, once it is let; refuses those below zero, and breaks at 13."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.may_answer = Event()
        self.is_asked = Event()

    def __call__(self, questions: Sequence[int]) -> list[int | Exception]:
        self.asked.append(list(questions))
        self.is_asked.set()
        assert self.may_answer.wait(10)
        if 13 in questions:
            raise OSError("broken")
        return [ValueError(number) if number < 0 else 2 * number for number in questions]

    async def heard(self) -> None:
        """Returns once a question was passed on."""
        await asyncio.to_thread(self.is_asked.wait, 10)


@contextmanager
def answering(oracle: Oracle, *, most: int = 8) -> Iterator[Together[int, int]]:
    together = Together[int, int](oracle, most=most)
    together.start()
    yield together
    oracle.may_answer.set()
    together.stop()


async def ask_all(together: Together[int, int], numbers: Sequence[int]) -> list[int | BaseException]:
    return await asyncio.gather(*(together.ask(number) for number in numbers), return_exceptions=True)


async def ask_while_busy(together: Together[int, int], oracle: Oracle, numbers: Sequence[int]) -> list[int]:
    """Answers to a first question, and to others that are asked while it is answered."""
    first = asyncio.create_task(together.ask(0))
    await oracle.heard()
    later = asyncio.create_task(ask_all(together, numbers))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    oracle.may_answer.set()
    return [await first, *(await later)]  # pyright: ignore[reportReturnType]


def test_what_is_asked_meanwhile_is_answered_at_once() -> None:
    oracle = Oracle()

    with answering(oracle) as together:
        assert asyncio.run(ask_while_busy(together, oracle, range(1, 6))) == [0, 2, 4, 6, 8, 10]

    assert oracle.asked == [[0], [1, 2, 3, 4, 5]]


def test_no_more_than_so_many_are_answered_at_once() -> None:
    oracle = Oracle()

    with answering(oracle, most=2) as together:
        assert asyncio.run(ask_while_busy(together, oracle, range(1, 6))) == [0, 2, 4, 6, 8, 10]

    assert oracle.asked == [[0], [1, 2], [3, 4], [5]]


def test_a_refusal_is_for_the_one_who_asked() -> None:
    oracle = Oracle()
    oracle.may_answer.set()

    with answering(oracle) as together:
        fine, refused, also_fine = asyncio.run(ask_all(together, [1, -1, 2]))

    assert (fine, also_fine) == (2, 4) and isinstance(refused, ValueError)


def test_what_breaks_one_round_does_not_end_the_next() -> None:
    async def scene(together: Together[int, int]) -> None:
        broken = await ask_while_busy(together, oracle, [1, 13])
        assert [type(answer) for answer in broken] == [int, OSError, OSError]
        assert await together.ask(1) == 2

    oracle = Oracle()
    with answering(oracle) as together:
        asyncio.run(scene(together))


def test_who_has_gone_keeps_nobody_from_an_answer() -> None:
    async def scene(together: Together[int, int]) -> None:
        gone, here = asyncio.create_task(together.ask(1)), asyncio.create_task(together.ask(2))
        await oracle.heard()
        gone.cancel()
        oracle.may_answer.set()

        assert await here == 4
        with pytest.raises(asyncio.CancelledError):
            await gone

    oracle = Oracle()
    with answering(oracle) as together:
        asyncio.run(scene(together))


def test_what_was_asked_before_the_end_is_answered_and_ends_the_thread(wait_until: Callable[..., None]) -> None:
    async def scene() -> None:
        first = asyncio.create_task(together.ask(0))
        await oracle.heard()
        later = asyncio.create_task(ask_all(together, range(1, 4)))
        await asyncio.to_thread(wait_until, lambda: together._asked.qsize() == 3)
        ended = asyncio.create_task(asyncio.to_thread(together.stop))
        await asyncio.to_thread(wait_until, lambda: together._asked.qsize() == 4)  # the end is one of them
        oracle.may_answer.set()

        assert [await first, *await later] == [0, 2, 4, 6]
        await ended

    oracle = Oracle()
    together = Together[int, int](oracle, most=8, name="the last oracle")
    together.start()
    asyncio.run(scene())

    assert "the last oracle" not in {thread.name for thread in threading.enumerate()}


def test_what_is_asked_after_the_end_is_refused() -> None:
    together = Together[int, int](Oracle(), most=8)
    together.start()
    together.stop()

    with pytest.raises(Ended):
        asyncio.run(asyncio.wait_for(together.ask(1), timeout=10))
