"""Questions that come at about the same time, answered together. Knows nothing of what is asked."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")

AnswerAll = Callable[[Sequence[QuestionT]], Awaitable[Sequence[AnswerT | Exception]]]
"""Answers all of them in order; an exception in the place of an answer is raised for who asked that question."""


class Together(Generic[QuestionT, AnswerT]):
    """Nobody waits for company: what is asked while others are being answered is answered next.

    An answer was never looked for before its question was asked.
    """

    def __init__(self, answer_all: AnswerAll[QuestionT, AnswerT], *, most: int, lanes: int = 1) -> None:
        """At most ``most`` questions are answered at once, in at most ``lanes`` places side by side."""
        self._answer_all, self._most, self._lanes = answer_all, most, lanes
        self._waiting: deque[tuple[QuestionT, asyncio.Future[AnswerT]]] = deque()
        self._working: set[asyncio.Task[None]] = set()

    async def ask(self, question: QuestionT) -> AnswerT:
        """The answer to ``question``; raises what it is answered with, or what kept all of them from being answered."""
        future: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if len(self._working) < self._lanes:
            task = asyncio.create_task(self._work())
            self._working.add(task)
            task.add_done_callback(self._working.discard)
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            try:
                answers = await self._answer_all([question for question, _ in batch])
            except Exception as error:  # noqa: BLE001  (it is raised again, where the question was asked)
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                _settle(future, answer)


def _settle(future: asyncio.Future[AnswerT], answer: AnswerT | Exception) -> None:
    if future.done():  # who asked has gone
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
