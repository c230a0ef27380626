"""Questions that are asked while others are answered are answered together, each for itself."""

import asyncio
from collections.abc import Sequence

import pytest

from api.together import Together


class Oracle:
    """Doubles numbers, once it is let; refuses those below zero, and breaks at 13."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.may_answer = asyncio.Event()
        self.is_asked = asyncio.Event()

    async def __call__(self, questions: Sequence[int]) -> list[int | Exception]:
        self.asked.append(list(questions))
        self.is_asked.set()
        await self.may_answer.wait()
        if 13 in questions:
            raise OSError("broken")
        return [ValueError(number) if number < 0 else 2 * number for number in questions]


async def ask_all(together: Together[int, int], numbers: Sequence[int]) -> list[int | BaseException]:
    return await asyncio.gather(*(together.ask(number) for number in numbers), return_exceptions=True)


def test_what_is_asked_meanwhile_is_answered_at_once() -> None:
    async def scene() -> None:
        oracle = Oracle()
        together = Together[int, int](oracle, most=8)
        first = asyncio.create_task(together.ask(0))
        await oracle.is_asked.wait()
        later = asyncio.create_task(ask_all(together, range(1, 6)))
        await asyncio.sleep(0)
        oracle.may_answer.set()

        assert [await first, *await later] == [0, 2, 4, 6, 8, 10]
        assert oracle.asked == [[0], [1, 2, 3, 4, 5]]

    asyncio.run(scene())


def test_no_more_than_so_many_are_answered_at_once() -> None:
    async def scene() -> None:
        oracle = Oracle()
        oracle.may_answer.set()

        assert await ask_all(Together[int, int](oracle, most=2), range(5)) == [0, 2, 4, 6, 8]
        assert max(map(len, oracle.asked)) == 2

    asyncio.run(scene())


def test_a_refusal_is_for_the_one_who_asked() -> None:
    async def scene() -> None:
        oracle = Oracle()
        oracle.may_answer.set()

        fine, refused, also_fine = await ask_all(Together[int, int](oracle, most=8), [1, -1, 2])

        assert (fine, also_fine) == (2, 4) and isinstance(refused, ValueError)

    asyncio.run(scene())


def test_what_breaks_one_round_does_not_end_the_next() -> None:
    async def scene() -> None:
        oracle = Oracle()
        oracle.may_answer.set()
        together = Together[int, int](oracle, most=8)

        broken = await ask_all(together, [1, 13])

        assert [type(answer) for answer in broken] == [OSError, OSError]
        assert await together.ask(1) == 2

    asyncio.run(scene())


def test_who_has_gone_keeps_nobody_from_an_answer() -> None:
    async def scene() -> None:
        oracle = Oracle()
        together = Together[int, int](oracle, most=8)
        gone, here = asyncio.create_task(together.ask(1)), asyncio.create_task(together.ask(2))
        await oracle.is_asked.wait()
        gone.cancel()
        oracle.may_answer.set()

        assert await here == 4
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(scene())
