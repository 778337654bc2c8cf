"""Questions on their way through the engine, as a coroutine sees them: started, told piece by piece, ended, dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

import anyio
from starlette.requests import Request

from errata.serve.engine import Engine
from errata.serve.errors import ApiError
from errata.serve.row import Ended, Event, Failed, Question, Row, Started
from errata.serve.settings import ServerSettings

LOOK = 0.1
"""Seconds between two looks whether a client is still there."""


class Gate:
    """Counts texts that are asked for; too many are refused at once rather than kept waiting."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.open = 0

    def ask(self, questions: Sequence[Question]) -> Asking:
        """Begin to have questions answered. Raises ApiError, 429, where there is no room for all of them."""
        most = self.settings.most_rows + self.settings.most_waiting
        if self.open + len(questions) > most:
            raise ApiError(
                429, f"{self.open} texts are being answered or wait; try again later", "overloaded"
            )
        return Asking(self, questions)

    def count(self, change: int) -> None:
        """Note texts that came or went."""
        self.open += change
        self.engine.metrics.rows.set(self.open)


class Asking:
    """Questions that are answered together. To be closed, which drops what is not answered by then."""

    def __init__(self, gate: Gate, questions: Sequence[Question]) -> None:
        loop = asyncio.get_running_loop()
        self._gate, self._count = gate, len(questions)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._early: list[tuple[int, Event]] = []
        self._closed = False
        self.prompt_tokens = [0] * len(questions)
        self.new_tokens = [0] * len(questions)
        self.deadline = loop.time() + gate.settings.timeout

        def emit(index: int, event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self._rows = [Row(question, partial(emit, i)) for i, question in enumerate(questions)]
        gate.count(self._count)
        try:
            for row in self._rows:
                gate.engine.submit(row)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Have no more of it."""
        if not self._closed:
            self._closed = True
            self._gate.count(-self._count)
            for row in self._rows:
                row.cancelled = True

    async def start(self) -> None:
        """Wait until all prompts were read. Raises the error of one that could not be, ApiError after too long."""
        waiting = self._count
        while waiting:
            index, event = await self._next()
            if isinstance(event, Started):
                self.prompt_tokens[index] = event.prompt_tokens
                self._gate.engine.metrics.prompt_tokens.inc(event.prompt_tokens)
                waiting -= 1
            else:
                self._early.append((index, event))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield what is told of each question until all are answered; errors as :meth:`start` raises them."""
        going = self._count
        while going:
            index, event = self._early.pop(0) if self._early else await self._next()
            if isinstance(event, Ended):
                self.new_tokens[index] = event.tokens
                going -= 1
            yield index, event

    async def _next(self) -> tuple[int, Event]:
        left = self.deadline - asyncio.get_running_loop().time()
        try:
            index, event = await asyncio.wait_for(self._events.get(), max(0.001, left))
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
            seconds = self._gate.settings.timeout
            raise ApiError(504, f"the answer was not there within {seconds:g} s", "timeout") from error
        if isinstance(event, Failed):
            raise event.error
        return index, event


async def until_gone(request: Request) -> None:
    """Return once a client has closed its connection."""
    while not await request.is_disconnected():
        await anyio.sleep(LOOK)
