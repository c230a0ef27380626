"""Questions that come at about the same time, answered together, in threads. Knows nothing of what is asked.

In threads, because asking SQL there takes a third of the time that asking it from the event loop takes, and what is
answered does not queue behind all the other requests between two statements.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Generic, TypeVar

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")

AnswerAll = Callable[[Sequence[QuestionT]], Sequence[AnswerT | Exception]]
"""Answers all of them in order; an exception in the place of an answer is raised for who asked that question."""


class Ended(RuntimeError):
    """Nobody is left to answer."""


class Together(Generic[QuestionT, AnswerT]):
    """Nobody waits for company: what is asked while others are being answered is answered next.

    An answer was never looked for before its question was asked.
    """

    def __init__(
        self, answer_all: AnswerAll[QuestionT, AnswerT], *, most: int, lanes: int = 1, name: str = "together"
    ) -> None:
        """At most ``most`` questions are answered at once, by at most ``lanes`` threads side by side."""
        self._answer_all, self._most = answer_all, most
        self._asked: SimpleQueue[tuple[QuestionT, asyncio.Future[AnswerT]] | None] = SimpleQueue()
        # What is asked must come before the end or be refused: behind it nobody would take it up.
        self._has_ended, self._putting = False, Lock()
        self._threads = [Thread(target=self._work, name=name, daemon=True) for _ in range(lanes)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads once what was asked is answered, soon."""
        with self._putting:
            self._has_ended = True
            for _ in self._threads:
                self._asked.put(None)
        for thread in self._threads:
            thread.join(timeout=2)

    async def ask(self, question: QuestionT) -> AnswerT:
        """The answer to ``question``.

        Raises:
            Ended: it was asked after ``stop``.
            Exception: what it is answered with, or what kept all of them from being answered.
        """
        future: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        with self._putting:
            if self._has_ended:
                raise Ended
            self._asked.put((question, future))
        return await future

    def _work(self) -> None:
        while (first := self._asked.get()) is not None:
            batch = [first, *self._company()]
            try:
                answers = self._answer_all([question for question, _ in batch])
            except Exception as error:  # noqa: BLE001  (it is raised again, where the question was asked)
                answers = [error] * len(batch)
            settled = [(future, answer) for (_, future), answer in zip(batch, answers, strict=True)]
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                first[1].get_loop().call_soon_threadsafe(_settle, settled)

    def _company(self) -> list[tuple[QuestionT, asyncio.Future[AnswerT]]]:
        """What was asked by now, besides."""
        found: list[tuple[QuestionT, asyncio.Future[AnswerT]]] = []
        with suppress(Empty):
            while len(found) < self._most - 1:
                if (asked := self._asked.get_nowait()) is None:
                    self._asked.put(None)
                    break
                found.append(asked)
        return found


def _settle(answers: Sequence[tuple[asyncio.Future[AnswerT], AnswerT | Exception]]) -> None:
    for future, answer in answers:
        if future.done():  # who asked has gone
            continue
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
