"""/v1/completions and /v1/chat/completions: whole answers, and streams of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from errata.serve.asking import Asking, Gate, until_gone
from errata.serve.catalogue import Choice
from errata.serve.desk import Desk
from errata.serve.errors import ApiError, answer_to
from errata.serve.row import Ended, Question, Text
from errata.serve.sampling import Sampling
from errata.serve.schemas import ChatCompletion, Completion

REVISION, EDITS = "x-errata-revision", "x-errata-edits"
"""Headers of an answer: the name of the edits that acted, and their ids."""
SHORT_ANSWER = 16
"""Tokens of a completion that names no limit, as OpenAI's interface has it."""
PATIENCE = 10.0
"""Seconds beyond its time after which a stream that a client does not read is given up."""


@dataclass(frozen=True)
class _Form:
    """How answers are written: as completions, or as messages."""

    chat: bool
    choice: Choice
    number: str
    created: int

    def document(
        self, choices: list[dict[str, Any]], *, chunk: bool, usage: Mapping[str, int] | None
    ) -> dict[str, Any]:
        """Return an answer, or a part of one."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": self.number, "object": f"{kind}.chunk" if self.chat and chunk else kind, "created": self.created,
            "model": self.choice.model, "system_fingerprint": f"errata-{self.choice.revision}", "choices": choices,
            "errata": {"revision": self.choice.revision, "edits": list(self.choice.edits)},
            **({"usage": usage} if usage is not None or not chunk else {}),
        }  # fmt: skip

    def whole(self, index: int, text: str, reason: str) -> dict[str, Any]:
        """Return one whole answer."""
        own = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **own, "logprobs": None, "finish_reason": reason}

    def part(self, index: int, text: str | None, reason: str | None) -> dict[str, Any]:
        """Return more of one answer; no text: its end."""
        if self.chat:
            own: dict[str, Any] = {"delta": {} if text is None else {"content": text}}
        else:
            own = {"text": text or ""}
        return {"index": index, **own, "logprobs": None, "finish_reason": reason}


class EventStream(StreamingResponse):
    """A stream that ends what it was the answer to, however it ends, and does not wait for ever for its reader."""

    def __init__(
        self, content: AsyncIterator[str], asking: Asking, seconds: float, headers: dict[str, str]
    ) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={**headers, "cache-control": "no-store"}
        )
        self.asking, self.seconds = asking, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream."""
        try:
            with anyio.move_on_after(self.seconds):
                await super().__call__(scope, receive, send)
        finally:
            self.asking.close()


def routes(desk: Desk, gate: Gate) -> APIRouter:
    """Return both routes."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(body: Completion, request: Request) -> Response:
        """Continue a text, or several."""
        choice = desk.catalogue.choose(body.model, body.edits)
        limit = _limit(body.max_tokens or SHORT_ANSWER, gate, "max_tokens")
        common = _common(body, choice, limit)
        questions = [Question(prompt=prompt, **common) for prompt in body.prompts]
        return await _answer(
            _Form(False, choice, f"cmpl-{uuid.uuid4().hex}", _now()), questions, body, request, gate
        )

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatCompletion, request: Request) -> Response:
        """Continue a conversation."""
        choice = desk.catalogue.choose(body.model, body.edits)
        asked = body.max_completion_tokens or body.max_tokens or gate.settings.most_tokens
        limit = _limit(asked, gate, "max_completion_tokens")
        turns = tuple(message.turn for message in body.messages)
        questions = [Question(turns=turns, **_common(body, choice, limit))]
        form = _Form(True, choice, f"chatcmpl-{uuid.uuid4().hex}", _now())
        return await _answer(form, questions, body, request, gate)

    return router


def _now() -> int:
    return int(time.time())


def _limit(asked: int, gate: Gate, name: str) -> int:
    if asked > gate.settings.most_tokens:
        raise ApiError(
            400, f"{name}: at most {gate.settings.most_tokens}, found {asked}", "too_many_tokens", param=name
        )
    return asked


def _common(body: Completion | ChatCompletion, choice: Choice, limit: int) -> dict[str, Any]:
    seed = secrets.randbits(48) if body.seed is None else body.seed
    temperature = 0.0 if body.temperature is None else body.temperature
    sampling = Sampling(temperature, 1.0 if body.top_p is None else body.top_p, seed)
    return {"edits": choice.edits, "limit": limit, "stops": body.stops, "sampling": sampling}


async def _answer(
    form: _Form,
    questions: Sequence[Question],
    body: Completion | ChatCompletion,
    request: Request,
    gate: Gate,
) -> Response:
    headers = {REVISION: form.choice.revision, EDITS: ",".join(form.choice.edits)}
    asking = gate.ask(questions)
    try:
        await _start(asking, request)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            stream = _stream(form, asking, usage=usage)
            return EventStream(stream, asking, gate.settings.timeout + PATIENCE, headers)
    except BaseException:
        asking.close()
        raise
    try:
        return JSONResponse(await _whole(form, asking, request), headers=headers)
    finally:
        asking.close()


async def _start(asking: Asking, request: Request) -> None:
    await _or_gone(asking.start, request)


async def _or_gone(work: Any, request: Request) -> None:
    """Do something, unless the client goes away meanwhile."""
    failure: list[Exception] = []

    async def run(scope: anyio.CancelScope) -> None:
        try:
            await work()
        except Exception as error:  # raised below, not as a group of errors
            failure.append(error)
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, tasks.cancel_scope)
        await until_gone(request)
        failure.append(ApiError(400, "the client closed the connection", "disconnected"))
        tasks.cancel_scope.cancel()
    if failure:
        raise failure[0]


async def _whole(form: _Form, asking: Asking, request: Request) -> dict[str, Any]:
    texts: dict[int, list[str]] = {}
    reasons: dict[int, str] = {}

    async def collect() -> None:
        async for index, event in asking.events():
            if isinstance(event, Text):
                texts.setdefault(index, []).append(event.text)
            elif isinstance(event, Ended):
                reasons[index] = event.reason

    await _or_gone(collect, request)
    choices = [form.whole(i, _text(form, "".join(texts.get(i, []))), reasons[i]) for i in sorted(reasons)]
    return form.document(choices, chunk=False, usage=_usage(asking))


def _text(form: _Form, text: str) -> str:
    """Return an answer; a message begins without white space."""
    return text.lstrip() if form.chat else text


def _usage(asking: Asking) -> dict[str, int]:
    prompt, new = sum(asking.prompt_tokens), sum(asking.new_tokens)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _stream(form: _Form, asking: Asking, *, usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events; an error ends the stream as an event of its own."""
    begun: set[int] = set()
    try:
        async for index, event in asking.events():
            if isinstance(event, Text):
                text = event.text if index in begun else _text(form, event.text)
                if not text:
                    continue
                part = form.part(index, text, None)
                if form.chat and index not in begun:
                    part["delta"]["role"] = "assistant"
                begun.add(index)
                yield _event(form.document([part], chunk=True, usage=None))
            elif isinstance(event, Ended):
                yield _event(form.document([form.part(index, None, event.reason)], chunk=True, usage=None))
        if usage:
            yield _event(form.document([], chunk=True, usage=_usage(asking)))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the answer has begun, so its status is sent already
        yield _event(answer_to(error).body())
    finally:
        asking.close()


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
