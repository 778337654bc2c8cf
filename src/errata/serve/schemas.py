"""Bodies of requests: OpenAI's fields, those that are taken and those that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from errata.data.documents import fault
from errata.ledger.settings import Policy
from errata.methods import DEFAULT

LONGEST_NAME = 200
MOST_PROMPTS = 64
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Note = Annotated[str, Field(max_length=10_000)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "tools": ([],), "tool_choice": ("none",),
    "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "store": (False,),
}  # fmt: skip
"""Fields that this server does not follow, with the values that ask for nothing."""
NOTES = frozenset({"user", "metadata", "safety_identifier"})
"""Fields that say who asks; they do not change an answer."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_texts(cls, fields: Any) -> Any:
        """Raise ValueError where any text holds what is no character: no tokenizer takes it, nor does an answer."""
        reason = fault(fields)
        if reason is not None:
            raise ValueError(reason)
        return fields


class _Asked(_Body):
    """What both ways of asking have in common."""

    model: Name
    edits: Annotated[list[Name], Field(max_length=64)] = []
    """Ids or tags of edits that act as well as those of the model's name."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, fields: Any) -> Any:
        """Take out fields that ask for nothing. Raises ValueError for those that ask for what is not done."""
        if not isinstance(fields, dict):
            return fields
        wrong = [
            name
            for name, values in NEUTRAL.items()
            if fields.get(name) is not None and not any(_same(fields[name], one) for one in values)
        ]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: not supported by this server; leave it out")
        return {name: value for name, value in fields.items() if name not in NEUTRAL and name not in NOTES}

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _same(value: Any, other: Any) -> bool:
    number = isinstance(value, (int, float)) and isinstance(other, (int, float))
    return value == other and (number or type(value) is type(other))


class StreamOptions(_Body):
    """What else a stream tells."""

    include_usage: bool = False


class Completion(_Asked):
    """A text to be continued, or several."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> list[str]:
        """The texts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TextPart(_Body):
    """Part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: Name | None = None

    @property
    def turn(self) -> dict[str, str]:
        """Role and text as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletion(_Asked):
    """A conversation to be continued."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_turns(self) -> ChatCompletion:
        roles = [message.turn["role"] for message in self.messages]
        if roles[-1] != "user":
            raise ValueError("messages: the last one must be the user's")
        if "system" in roles[1:]:
            raise ValueError("messages: a system message must be the first one")
        return self


class NewRequest(_Body):
    """A fact to be changed."""

    prompt: Annotated[str, Field(max_length=10_000)]
    """``{}`` marks the subject."""
    subject: Annotated[str, Field(max_length=1000)]
    target: Annotated[str, Field(max_length=10_000)]
    target_old: Annotated[str, Field(max_length=10_000)] | None = None
    id: Name | None = None


class Order(_Body):
    """Why, and by whom."""

    reason: Note = ""
    author: Annotated[str, Field(max_length=LONGEST_NAME)] = ""


class Applying(Order):
    """An edit to be put in place again."""

    guard: bool = True
    """Whether an edit out of bounds is refused."""
    conflicts: Policy | None = None
    """A request that contradicts an edit in place: error, replace it, or keep both; default: the ledger's setting."""


class NewEdit(Applying):
    """An edit to be fitted, measured and applied."""

    requests: Annotated[list[NewRequest], Field(min_length=1, max_length=1000)]
    method: Name = DEFAULT
    settings: Annotated[dict[Name, Any], Field(max_length=64)] = {}
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    source: Note = ""
    after: Name | None = None
    """Id of an edit in place that the new one continues and takes the place of."""
    halve: bool = True
    """Whether a batch that fails is halved."""


_Asked.model_rebuild()
Completion.model_rebuild()
ChatCompletion.model_rebuild()
