"""Rules of writing: scripts, the space between prompt and answer, sentence ends, thinking blocks.

All rules use Unicode properties (UAX #14 line breaking, #24 scripts, #29 segmentation, #44) through the ``regex``
library, so there is no list of languages.
"""

from __future__ import annotations

import unicodedata
from typing import Literal

import regex

Join = Literal["auto", "space", "none"]
"""Between prompt and answer: a space if their script needs one, always a space, or nothing."""
JOINS = ("auto", "space", "none")

UNSPACED = (
    r"\p{Line_Break=SA}\p{Line_Break=AK}\p{Line_Break=AP}\p{Line_Break=AS}\p{Line_Break=VI}\p{Line_Break=VF}"
    r"\p{Ideographic}\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Bopomofo}\p{Script=Yi}\p{Script=Tibetan}"
    "\N{KATAKANA-HIRAGANA PROLONGED SOUND MARK}"
)
"""Inside a character class: letters of scripts without spaces between words. Those whose words need a dictionary to
separate (Thai, Lao, Khmer, Burmese), the aksara scripts of South East Asia, and the East Asian ones."""
TERMINAL = r"\p{Sentence_Terminal}"
"""A mark that ends a sentence, in any script: . ! ? and their equivalents."""

_UNSPACED = regex.compile(rf"[{UNSPACED}]")
_WIDE = regex.compile(
    r"(?V1)[[\p{East_Asian_Width=W}\p{East_Asian_Width=F}]&&[\p{P}\p{S}\p{N}\p{Latin}]--\p{Extended_Pictographic}]"
)
"""Full-width punctuation, signs, digits and Latin letters: the character cell includes the space."""
_OUTSIDE = r"[\s\p{Bidi_Control}\u200B\u2060\uFEFF]+"
_EDGES = regex.compile(rf"\A{_OUTSIDE}|{_OUTSIDE}\Z")
_INVISIBLE = regex.compile(r"[\p{Bidi_Control}\u200B\u2060\uFEFF\p{Variation_Selector}]+\Z")
_WORD = rf"(?V1)[[\p{{L}}\p{{N}}]--[{UNSPACED}]]"
_MARKS = r"[^\w\s]*"
_BORDER_SPACED = regex.compile(
    rf"(?V1){_WORD}{_MARKS}[^\S\n]+{_MARKS}[{UNSPACED}]|[{UNSPACED}]{_MARKS}[^\S\n]+{_MARKS}{_WORD}"
)
_BORDER_GLUED = regex.compile(rf"(?V1){_WORD}{_MARKS}[{UNSPACED}]|[{UNSPACED}]{_MARKS}{_WORD}")

_CLOSING = regex.compile(
    rf"\p{{Pe}}|[{TERMINAL}\p{{Line_Break=CL}}\p{{Line_Break=CP}}\p{{Line_Break=EX}}\p{{Line_Break=IS}}](?![\p{{L}}\p{{N}}])"
    r"|[\p{Pf}\p{Pi}\"](?![\p{L}\p{N}])|\p{M}|['’](?:s|re|ve|ll|d|m|t)\b"
)
"""Beginnings of an answer that attach to the text before: closing punctuation, marks on the last letter."""
_POSTFIX = regex.compile(r"\p{Line_Break=PO}")
_OPENING = regex.compile(r"[\p{Ps}\p{Line_Break=OP}]")
_ELIDED = regex.compile(r"(?<![\p{L}\p{M}'’])(\p{Latin}+)['’]\Z")
_CONSONANT_END = regex.compile(r"(?i)(?:qu|[^aeiouyàâäéèêëíîïóôöúùûü])\Z")
_NUMBER = regex.compile(r"(?:(?<![\d.,])\d{1,3}[.,]|(?<![\d:])\d{1,2}:)\Z")
_LABELS = regex.compile(r"(?m)^[^\n:：]{1,40}:(?=[ ]*[^\s/])([ ]?)")
_CLAUSE = regex.compile(r"[.,:;!?…؟،؛।॥\p{Sentence_Terminal}]+\Z")
_GROUP = regex.compile(r"[^\S\n]*(?:\([^()]*\)|\[[^\[\]]*\])\Z")

_LAST_LETTER = regex.compile(r"[\p{L}\p{N}][^\p{L}\p{N}]*\Z")
_SENTENCE_END = regex.compile(rf"[{TERMINAL}][\p{{Pe}}\p{{Pf}}\"']*\Z")
_IDEOGRAPHIC_STOP = regex.compile(
    r"\p{Script=Han}|\p{Script=Hiragana}|\p{Script=Katakana}|\p{Script=Bopomofo}"
)
_DANDA = regex.compile(r"\p{Script=Devanagari}|\p{Script=Bengali}|\p{Script=Gurmukhi}|\p{Script=Oriya}")
_DICTIONARY = regex.compile(r"\p{Line_Break=SA}")
_CONNECTOR = regex.compile(r"\p{Pc}|[@\\]")
_APOSTROPHE_OPENS = regex.compile(r"(?:^|[\s(])['‘]\p{L}")
_QUOTE = regex.compile(r"(?:[\p{Pi}\p{Pf}\"']|`+|\*+)\Z")
_FACTOR = regex.compile(r"[\d)]\s*\Z")
_FREE = regex.compile(r"[\s\p{Ps}\p{Pi}\p{Pd}=:：]\Z")
_INITIAL_QUOTE = regex.compile(r"\p{Pi}")
_LEADING_SIGN = regex.compile(r"[\p{Sc}\p{Pd}\p{Sm}/#&~^]")
_DASH = regex.compile(r"\p{Pd}")
_CURRENCY = regex.compile(r"\p{Sc}")
_DEGREE_UNIT = regex.compile(r"[CFKNSEW](?!\p{L})")
_OPERAND = regex.compile(r"[\p{N})]")
_PREFIX_SIGN = regex.compile(r"\p{Line_Break=PR}")
_OPERATOR = regex.compile(r"[\p{Sm}^&|]")
_CODE_OR_STAR = regex.compile("[`*]")
_OPERATORS = regex.compile(r"[\p{Sm}\p{Pd}^&|]+\Z")

_THOUGHTS = r"think|thinking|thought|thoughts|reasoning"
_BLOCK_OPEN = regex.compile(rf"(?i)<({_THOUGHTS})>|\[(THINK)\]|◁(think)▷")
_BLOCK = regex.compile(rf"(?i)</?(?:{_THOUGHTS})>|\[/?THINK\]|◁/?think▷")
_BLOCK_CLOSE = regex.compile(rf"(?i)</(?:{_THOUGHTS})>|\[/THINK\]|◁/think▷")


def strip(text: str) -> str:
    """Remove white space and invisible marks (direction marks, zero-width space) from both ends."""
    return _EDGES.sub("", text)


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script without spaces between words."""
    return bool(_UNSPACED.match(character))


def joint(prompt: str, answer: str, join: Join = "auto", *, lead: str | None = None) -> tuple[str, int]:
    """Join prompt and answer as running text; return it and where the answer starts.

    The answer is stripped. ``join``: ``auto`` inserts a space where the script needs one, see :func:`spaced`;
    ``space`` always inserts one; ``none`` leaves the prompt unchanged, including its trailing space. ``lead``: what
    a chat template puts between the two, where ``join`` is auto.
    """
    body = strip(answer)
    head_text = prompt.rstrip(" \t")
    if join == "none":
        head = prompt
    elif join == "space":
        head = f"{head_text} " if head_text else head_text
    elif lead is not None:
        head = prompt + lead
    else:
        head = head_text + (" " if spaced(head_text, body, ends_in_space=head_text != prompt) else "")
    return head + body, len(head)


def statement(prompt: str, answer: str, join: Join = "auto") -> str:
    """Join prompt and answer as a sentence that ends in the full stop of its script."""
    text = joint(prompt, answer, join)[0]
    if _SENTENCE_END.search(text):
        return text
    return text + _stop(text)


def filled(template: str, **texts: str) -> str:
    """Replace each ``{name}`` of a template by its text; braces inside the texts and other braces stay."""
    slots = regex.compile("|".join(rf"\{{{name}\}}" for name in texts))
    return slots.sub(lambda match: texts[match[0][1:-1]], template)


def _stop(text: str) -> str:
    """Return the full stop for the script of a text's last letter; Thai and similar scripts have none."""
    last = _last_letter(text)
    if _IDEOGRAPHIC_STOP.match(last):
        return "\N{IDEOGRAPHIC FULL STOP}"
    if _DANDA.match(last):
        return "\N{DEVANAGARI DANDA}"
    return "" if _DICTIONARY.match(last) else "."


def spaced(prompt: str, answer: str, *, ends_in_space: bool = False) -> bool:
    """Whether to put a space between a prompt and its answer; neither has one at the boundary.

    No space inside unspaced scripts, after an opening mark (brackets, quotes, l', $, /, -, @, #, _), or before a
    closing one. Where two scripts meet, the majority of such boundaries inside the prompt decides; if it has none,
    there is a space unless the prompt ends in an unspaced script. ``ends_in_space``: the original prompt had a
    trailing space, which decides for ambiguous signs.
    """
    prompt = _INVISIBLE.sub("", prompt)
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return False
    if (prompt[-1] + answer[0]).isascii() and prompt[-1].isalpha() and answer[0].isalpha():
        return True  # what the rules below come to, for most prompts and at a tenth of the time
    if _CLOSING.match(answer) or (_POSTFIX.match(answer) and prompt[-1].isdigit()):
        return False
    for rule in (_after_opening, _after_apostrophe, _after_quote, _after_clause, _after_sign):
        decision = rule(prompt, answer, ends_in_space)
        if decision is not None:
            return decision
    return _between_scripts(prompt, answer)


def _between_scripts(prompt: str, answer: str) -> bool:
    """Decide by the scripts on both sides."""
    if _WIDE.match(prompt[-1]):
        return False
    inner = _GROUP.sub("", prompt)  # after "Tokyo (...)" the script of Tokyo decides
    last = _last_letter(inner or prompt) or prompt[-1]
    left_unspaced, right_unspaced = is_unspaced(last), is_unspaced(answer[0]) or bool(_WIDE.match(answer[0]))
    if left_unspaced == right_unspaced:
        return not left_unspaced
    space = len(_BORDER_SPACED.findall(prompt))
    glue = len(_BORDER_GLUED.findall(prompt))
    if space or glue:
        return space > glue
    return not left_unspaced


def _last_letter(text: str) -> str:
    match = _LAST_LETTER.search(text)
    return match[0][0] if match else ""


def _after_opening(prompt: str, answer: str, ends_in_space: bool) -> bool | None:
    if _OPENING.match(prompt[-1]) or _CONNECTOR.match(prompt[-1]):
        return False
    return None


def _after_apostrophe(prompt: str, answer: str, ends_in_space: bool) -> bool | None:
    """No space after l', dell', qu', O'; a space after a plural's apostrophe, a dropped g or a vowel (un po')."""
    match = _ELIDED.search(prompt)
    if match is None or _APOSTROPHE_OPENS.search(prompt):
        return None
    word = match[1]
    if word in ("O", "o"):
        return False
    plural = len(word) > 1 and word[-1] in "sS"
    clipped = len(word) > 3 and word.endswith("in")
    return plural or clipped or _CONSONANT_END.search(word) is None


def _after_quote(prompt: str, answer: str, ends_in_space: bool) -> bool | None:
    """No space after an opening quote (or a Markdown mark used like one)."""
    match = _QUOTE.search(prompt)
    if match is None:
        return None
    mark, before = match[0], prompt[: match.start()]
    operator = mark == "*" and _FACTOR.search(before) is not None
    if operator:
        return before[-1].isspace() or ends_in_space
    return None if _closes(mark, before) else False


def _closes(mark: str, before: str) -> bool:
    """Whether a quotation mark closes: decided by the open ones, then by the text before it."""
    free = not before or bool(_FREE.search(before))
    if mark in "“‘":  # closes what German opens below the line
        low = "„" if mark == "“" else "‚"
        return before.count(low) > before.count(mark)
    if mark in "”»’›":
        openers = {"”": "“„", "»": "«", "’": "‘‚", "›": "‹"}[mark]
        inside = sum(before.count(one) for one in openers) > before.count(mark)
        return inside or not free
    if _INITIAL_QUOTE.match(mark):
        # » ... « as German and Danish have it
        return before.count({"«": "»", "‹": "›"}.get(mark, "\0")) > before.count(mark)
    odd = before.count(mark) % 2 == 1
    if odd and not _CODE_OR_STAR.match(mark) and free:
        return before.rstrip() != before  # in " a "b" the last mark opens a new quotation
    return odd or not (free or is_unspaced(before[-1]))


def _after_clause(prompt: str, answer: str, ends_in_space: bool) -> bool | None:
    """A space after . , : ; ! ? except inside a number, in an unspaced script, or if the labels have none."""
    clause = _CLAUSE.search(prompt)
    if clause is None or _WIDE.match(prompt[-1]):
        return None
    if answer[0].isdigit() and _NUMBER.search(prompt):
        return ends_in_space
    before = prompt[: clause.start()]
    if clause[0] == ":" and not ends_in_space:
        *labels, _ = [*_LABELS.findall(prompt + "x")] or [""]
        if labels:
            return sum(map(len, labels)) * 2 > len(labels)
    if before and is_unspaced(_last_letter(before) or " "):
        return ends_in_space or (not is_unspaced(answer[0]) and _between_scripts(before, answer))
    return True


def _after_sign(prompt: str, answer: str, ends_in_space: bool) -> bool | None:
    """No space after a prefix sign ($ / - # ~); after an operator, the same as before it."""
    sign, before = prompt[-1], prompt[:-1]
    space_before = not before or before[-1].isspace()
    outer = before.rstrip()[-1:]
    if ends_in_space and _LEADING_SIGN.match(sign):
        return True
    if sign == "#":
        return bool(before) and before[-1].isalpha() and not is_unspaced(before[-1])
    if sign == "/" or sign in "-\u2010\u2011\u2212~":
        return False
    if _DASH.match(sign):
        return space_before
    if _CURRENCY.match(sign):
        return outer.isdigit() and not answer[0].isdigit()
    if sign == "°":
        return None if not _DEGREE_UNIT.match(answer) else False
    if sign == "+":
        if not space_before:
            return not (outer.isdigit() and answer[0].isdigit())
        return bool(_OPERAND.match(outer))
    if _PREFIX_SIGN.match(sign):
        return False
    if _OPERATOR.match(sign):
        operators = _OPERATORS.search(prompt)
        start = operators.start() if operators else len(prompt)
        return start > 0 and prompt[start - 1].isspace()
    return None


def after_thoughts(text: str) -> str:
    """Return the text after a thinking block; empty where the block is not closed.

    If the prompt opened the block, the text has only its end. A text without a block is returned unchanged.
    """
    if not _BLOCK.search(text):
        return text
    closes = list(_BLOCK_CLOSE.finditer(text))
    rest = text[closes[-1].end() :] if closes else text
    opening = _BLOCK_OPEN.search(rest)
    if opening and not rest[: opening.start()].strip():
        return ""
    return rest


def bare_thoughts(text: str) -> str:
    """Return the text of thinking blocks without their tags."""
    return _BLOCK_CLOSE.sub("", _BLOCK_OPEN.sub("", text)).strip()


def closes_block(text: str) -> bool:
    """Whether a text is the closing tag of a thinking block."""
    return _BLOCK_CLOSE.fullmatch(text) is not None


def last_block(text: str) -> str:
    """Return the opening tag of a text's last thinking block; empty where there is none."""
    opens = list(_BLOCK_OPEN.finditer(text))
    return opens[-1][0] if opens else ""


def unclosed_block(text: str) -> str | None:
    """Return the text that closes the thinking block at the end of a text; None where there is none."""
    opens = list(_BLOCK_OPEN.finditer(text))
    if not opens or _BLOCK_CLOSE.search(text, opens[-1].end()) or text[opens[-1].end() :].strip():
        return None
    mark = opens[-1][0]
    lines = "\n" if text.endswith("\n") else "\n\n"
    return f"{lines}{mark[0]}/{mark[1:]}\n\n"


def folded(text: str) -> str:
    """Return a text for comparison whatever its capitals and however its accents are encoded."""
    return unicodedata.normalize("NFC", text).casefold()


def names(text: str, phrase: str) -> bool:
    """Whether a text contains a phrase as whole words; in scripts without spaces, anywhere."""
    return find_name(text, phrase) >= 0


def find_name(text: str, phrase: str) -> int:
    """Return where a text first contains a phrase as whole words, see :func:`names`; -1 where it does not."""
    at = text.find(phrase) if phrase else -1
    while at >= 0:
        before, after = text[at - 1 : at], text[at + len(phrase) : at + len(phrase) + 1]
        if not (_one_word(before, phrase[0]) or _one_word(phrase[-1], after)):
            return at
        at = text.find(phrase, at + 1)
    return -1


def _one_word(first: str, second: str) -> bool:
    """Whether two neighbouring characters belong to one word."""
    pair = [c for c in (first, second) if c and (c.isalnum() or c == "_")]
    return len(pair) == 2 and not any(is_unspaced(c) for c in pair)
