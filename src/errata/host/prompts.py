"""How a prompt is formatted for a model: unchanged, with an answer cue, or as a user's turn of a conversation.

What a method edits, what is scored and what is generated all go through here, so they are one text: behind the
same template, the same (closed) thinking block, with the same join of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import regex

from errata.errors import ConfigError
from errata.registry import unknown
from errata.types import AskOptions
from errata.writing import (
    JOINS,
    Join,
    after_thoughts,
    bare_thoughts,
    closes_block,
    last_block,
    strip,
    unclosed_block,
)

Template = Literal["raw", "question", "chat", "auto"]
TEMPLATES = ("raw", "question", "chat", "auto")

_MARK = "\ue000prompt\ue001"
"""Placeholder of a text while a template is examined; private-use characters, which no template holds."""
_SYSTEM = "\ue000system\ue001"
_ANSWER = "\ue000answer\ue001"
_QUESTION = regex.compile(r"[?？؟⸮՞፧;⁇⁈]\s*\Z")
_EMPTY_BLOCK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class PromptFormat:
    """How prompts are formatted. Raises ConfigError for settings that are not known or do not belong together."""

    template: Template = "raw"
    """``raw``: unchanged. ``question``: an answer cue behind a prompt that ends in a question mark. ``chat``:
    a user's turn by the tokenizer's chat template. ``auto``: chat where there is a template, else question."""
    system: str | None = None
    """System prompt of a conversation; None: an empty one where the template takes one."""
    thinking: bool | None = None
    """Whether the template lets the model think first (its ``enable_thinking``); None: a direct answer where the
    template can ask for one. Answers are scored behind a closed block either way."""
    join: Join = "auto"
    """What comes between prompt and answer, see :func:`errata.writing.joint`."""

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ConfigError(unknown(str(self.template), list(TEMPLATES), "template"))
        if self.join not in JOINS:
            raise ConfigError(unknown(str(self.join), list(JOINS), "join"))
        if self.thinking not in (None, True, False):
            raise ConfigError(f"thinking must be on, off or left out, found {self.thinking!r:.40}")
        if self.system is not None and not isinstance(self.system, str):
            raise ConfigError(f"system must be a text, found {type(self.system).__name__}")
        fields = [name for name in ("system", "thinking") if getattr(self, name) is not None]
        if fields and self.template in ("raw", "question"):
            raise ConfigError(
                f"{' and '.join(fields)} need template='chat' (or auto), found {self.template!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)

    @property
    def is_default(self) -> bool:
        """Whether prompts are left unchanged."""
        return self == PromptFormat()


def prompt_format(base: PromptFormat, ask: AskOptions) -> PromptFormat:
    """Return a format with the prompt fields that the options set in place of its own.

    A system prompt or thinking without a template means ``chat``, where the base has none. Raises ConfigError for
    settings that are not known or do not belong together.
    """
    changes: dict[str, Any] = {name: value for name, value in ask.prompt_fields.items() if value is not None}
    thinking = changes.get("thinking")
    if ask.thinking_template is not None:
        changes.pop("thinking", None)  # a given template has its own block
    elif isinstance(thinking, str):
        if thinking not in ("on", "off", "forced"):
            raise ConfigError(f"thinking must be on or off, or forced for evaluation, found {thinking!r:.40}")
        changes["thinking"] = {"on": True, "off": False, "forced": None}[thinking]
    if (
        ask.template is None
        and base.template in ("raw", "question")
        and ("system" in changes or "thinking" in changes)
    ):
        changes["template"] = "chat"
    if changes.get("template", "chat") in ("raw", "question"):
        changes = {"system": None, "thinking": None, **changes}
    return replace(base, **changes) if changes else base


def recorded_format(record: Mapping[str, Any]) -> PromptFormat:
    """Read a format from an edit's record; records of earlier versions hold none and mean ``raw``."""
    names = PromptFormat.__dataclass_fields__
    return PromptFormat(**{name: value for name, value in record.items() if name in names})


@dataclass(frozen=True)
class Framed:
    """A prompt as the model reads it."""

    text: str
    """What is continued."""
    scored: str
    """What answers are scored behind: the same, a thinking block that it leaves open closed."""
    shift: int
    """How far the prompt's characters are moved inside the text."""
    special: bool
    """Whether the tokenizer adds its special tokens; a template brings its own."""
    lead: str | None
    """What comes between this text and an answer; None: what their script requires."""

    @property
    def open_block(self) -> str:
        """The mark of a thinking block that the text leaves open; empty where it leaves none."""
        return "" if unclosed_block(self.text) is None else last_block(self.text)


def frame(
    tokenizer: Any, settings: PromptFormat, prompt: str, prefix: str = "", before: int | None = None
) -> Framed:
    """Put a prompt into its format, running text ``prefix`` inside the user's turn.

    ``before``: a place in the prompt that the prefix must precede, as the subject's. A prompt that is a
    whole conversation already stays one: the prefix goes behind its begin token or the head of the user's turn
    and is left out where no such place is known. Raises ConfigError for a template that is not there.
    """
    template = settings.template
    if template == "auto":
        template = "chat" if has_chat(tokenizer) else "question"
    if template == "chat" and not _starts_special(tokenizer, prompt):
        return _chat(tokenizer, settings, prompt, prefix)
    lead = _lead_behind(tokenizer, prompt)
    text = prefixed(tokenizer, prompt, prefix, before)
    shift = len(text) - len(prompt)
    if template == "question":
        text = question(text)
    return Framed(text, _closed(text), shift, True, lead)


def prefixed(tokenizer: Any, prompt: str, prefix: str, before: int | None = None) -> str:
    """Put running text before a prompt, or inside the user's turn of a whole conversation; see :func:`frame`."""
    at = _opening(tokenizer, prompt, len(prompt) if before is None else before) if prefix else 0
    return prompt if at is None else prompt[:at] + prefix + prompt[at:]


def conversation(prompt: str) -> Framed:
    """Take a text as a whole conversation that brings its special tokens."""
    return Framed(prompt, prompt, 0, False, None)


def continued(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> Framed:
    """Write a conversation of several turns, up to where the assistant's next turn begins.

    ``turns``: role and content of each, a system prompt first or not at all, the user's last. A single turn is written
    as :func:`chat` writes it. Raises ConfigError where there is no template, or the template refuses the turns.
    """
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    opening, options = _conversation(tokenizer, turns[-1]["content"], system, None)
    given = turns[1:] if system is not None else turns
    text = _render(tokenizer, [*opening[:-1], *map(dict, given)], options)
    return Framed(text, _closed(text), 0, False, "")


def block_ends(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens that end a thinking block, which decoding would drop."""
    special = getattr(tokenizer, "all_special_ids", ())
    return {i for i in special if closes_block(tokenizer.convert_ids_to_tokens(i))}


def behind_thoughts(ids: list[int], ends: Set[int]) -> list[int]:
    """Cut a thinking block off generated ids, up to the last of the tokens that end one."""
    last = max((place for place, token in enumerate(ids) if token in ends), default=-1)
    return ids[last + 1 :]


def answer_of(text: str, open_block: str = "") -> str:
    """Return a continuation without its thinking block; thoughts that did not come to an end stay, marked so."""
    rest = after_thoughts(text)
    if open_block and rest == text:
        return f"{open_block}{text}"
    return rest or text


def thoughts_of(text: str, open_block: str = "") -> str:
    """Return what a continuation thinks before its answer, without tags; empty where it has no thinking block."""
    rest = after_thoughts(text)
    if rest == text:
        return text.strip() if open_block else ""
    return bare_thoughts(text[: len(text) - len(rest)])


def has_chat(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat(tokenizer: Any, prompt: str, *, system: str | None = None, thinking: bool | None = None) -> str:
    """Write a prompt as a user's turn, up to where the assistant's turn begins; see :class:`PromptFormat`.

    The text holds its special tokens: tokenise it with ``special`` off. Raises ConfigError for a tokenizer
    without a chat template, and for a system prompt or thinking that the template does not know.
    """
    turns, options = _conversation(tokenizer, prompt, system, thinking)
    return _render(tokenizer, turns, options)


def question(prompt: str) -> str:
    """Put an answer cue after a prompt that ends in a question mark; another prompt has its own cue."""
    return f"{prompt.rstrip()}\nAnswer:" if _QUESTION.search(prompt) else prompt


def _conversation(
    tokenizer: Any, prompt: str, system: str | None, thinking: bool | None
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Settle the turns and options that a template takes."""
    if not has_chat(tokenizer):
        raise ConfigError("the tokenizer has no chat template; use template='question', 'raw' or 'auto'")
    user = {"role": "user", "content": prompt}
    turns = [{"role": "system", "content": system or ""}, user]
    try:
        text = _render(tokenizer, turns)
    except ConfigError as error:
        if system:
            raise ConfigError(f"the chat template takes no system prompt; leave it out ({error})") from error
        turns = [user]
        text = _render(tokenizer, turns)
    if system and strip(system) not in text:
        raise ConfigError("the chat template leaves the system prompt out; put it into the prompt instead")
    on, off = ({"enable_thinking": flag, "thinking": flag} for flag in (True, False))
    knows = _render(tokenizer, turns, on) != _render(tokenizer, turns, off)
    if thinking is not None and not knows:
        word = "on" if thinking else "off"
        raise ConfigError(
            f"the chat template cannot turn thinking {word}: it has no enable_thinking; leave it out"
        )
    return turns, (on if thinking else off) if knows else {}


def _render(
    tokenizer: Any, turns: Sequence[dict[str, str]], options: Mapping[str, Any] | None = None, *,
    answered: bool = False,
) -> str:  # fmt: skip
    """Apply the chat template. Raises ConfigError where it refuses."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=not answered, **(options or {})
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise ConfigError(f"the chat template refuses {[turn['role'] for turn in turns]}: {error}") from error


def _chat(tokenizer: Any, settings: PromptFormat, prompt: str, prefix: str) -> Framed:
    content = prefix + prompt
    turns, options = _conversation(tokenizer, content, settings.system, settings.thinking)
    text = _render(tokenizer, turns, options)
    marked = _render(tokenizer, [*turns[:-1], {"role": "user", "content": _MARK}], options)
    head, mark, tail = marked.partition(_MARK)
    inner = text[len(head) : len(text) - len(tail)]
    if not mark or not (text.startswith(head) and text.endswith(tail)) or inner.strip() != content.strip():
        raise ConfigError(
            f"the chat template changes the prompt {prompt!r:.80}; write the conversation out, raw"
        )
    cut = 0 if inner == content else len(content) - len(content.lstrip())
    scored = _closed(text)
    if settings.thinking and scored == text:
        off = _render(tokenizer, turns, {"enable_thinking": False, "thinking": False})
        scored = off if off.startswith(text) else text + _EMPTY_BLOCK
    lead = _lead(tokenizer, turns, options, text, scored)
    return Framed(text, scored, len(head) + len(prefix) - cut, False, lead)


def _closed(text: str) -> str:
    close = unclosed_block(text)
    return text if close is None else text + close


def _lead(
    tokenizer: Any, turns: Sequence[dict[str, str]], options: Mapping[str, Any], text: str, scored: str
) -> str:
    """Return the white space that a template writes between its generation marker and an answer."""
    try:
        whole = _render(
            tokenizer, [*turns, {"role": "assistant", "content": _ANSWER}], options, answered=True
        )
    except ConfigError:
        return ""
    before = whole.partition(_ANSWER)[0]
    for base in (scored, text):
        between = before[len(base) :]
        if before.startswith(base) and not between.strip():
            return between
    return ""


def _special_texts(tokenizer: Any) -> list[str]:
    """List the special tokens' texts."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    texts = [str(token) for token in added.values() if getattr(token, "special", False)]
    return [text for text in {*texts, *map(str, getattr(tokenizer, "all_special_tokens", ()))} if text]


def _starts_special(tokenizer: Any, prompt: str) -> bool:
    return prompt.lstrip().startswith(tuple(_special_texts(tokenizer)) or ("\0",))


def _lead_behind(tokenizer: Any, prompt: str) -> str | None:
    """Return what comes between a conversation typed out in a prompt and its answer; None for running text."""
    if prompt.endswith(tuple(_special_texts(tokenizer)) or ("\0",)):
        return ""
    if not has_chat(tokenizer):
        return None
    try:
        turns, options = _conversation(tokenizer, _MARK, None, None)
        text = _render(tokenizer, turns, options)
    except ConfigError:
        return None
    marker = text.partition(_MARK)[2]
    if marker.strip() and prompt.rstrip(" \t").endswith(marker.rstrip(" \t")):
        return _lead(tokenizer, turns, options, text, text)
    return None


def _opening(tokenizer: Any, prompt: str, before: int) -> int | None:
    """Return where running text may be put in front of a prompt's ``before``-th character; None: nowhere."""
    specials = sorted(_special_texts(tokenizer), key=len, reverse=True)
    at = 0
    begin = str(getattr(tokenizer, "bos_token", None) or "")
    while begin and prompt.startswith(begin, at):
        at += len(begin)
    heads = [
        end for head in _heads(tokenizer) if (end := prompt.rfind(head, 0, before) + len(head)) >= len(head)
    ]
    if heads:
        return max(heads)
    return None if any(token in prompt[at:] for token in specials) else at


def _heads(tokenizer: Any) -> list[str]:
    """List what a chat template writes in front of a user's text: after another turn, after a system prompt."""
    if not has_chat(tokenizer):
        return []
    heads = []
    try:
        user, again = ({"role": "user", "content": text} for text in (_MARK, _ANSWER))
        turns = [user, {"role": "assistant", "content": _SYSTEM}, again]
        first, later = (part for part in (_render(tokenizer, [user]), _render(tokenizer, turns)))
        one, two = first.partition(_MARK)[0], later.partition(_ANSWER)[0].rpartition(_SYSTEM)[2]
        same = 0
        while same < min(len(one), len(two)) and one[-1 - same] == two[-1 - same]:
            same += 1
        heads.append(one[len(one) - same :])
    except ConfigError:
        pass
    try:
        turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _MARK}]
        heads.append(_render(tokenizer, turns).partition(_MARK)[0].partition(_SYSTEM)[2])
    except ConfigError:
        pass
    return [head for head in heads if head.strip()]
