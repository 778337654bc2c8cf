"""Matching of free answers: whether greedily generated text asserts an accepted answer.

Source: the generation protocol of "The Mirage of Model Editing" (arXiv 2502.11177): generation stops naturally and
the answer's length is not given away; here with deterministic matching instead of a judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import regex

from errata.writing import TERMINAL, UNSPACED, after_thoughts, is_unspaced, strip

_END = regex.compile(
    rf"(?V1)([.!?])[\"'\p{{Pe}}\p{{Pf}}\p{{Pi}}]*(\s+|$)|([{TERMINAL}--[.!?．]])[\"'\p{{Pe}}\p{{Pf}}\p{{Pi}}]*(\s*)"
)
"""The end of a sentence; marks other than . ! ? need no space after them."""
_INITIALS = regex.compile(r"\b(?:[^\W\d_]\.\s*){2,}")
_THOUSANDS = regex.compile(r"(?<![\d.,])\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,]*\d)")
_GROUPS = regex.compile(r"(?<![\d.,])\d{1,3}(?:[\u00A0\u2009\u202F'’]\d{3})+(?!\d)")
_DECIMAL = regex.compile(r"(?<![\d.])(\d+)\.(\d+)(?!\.?\d)|(?<![\d.,])(\d+),(\d{1,2})(?![.,]?\d)")
_TAG = regex.compile(r"</?\p{L}[^<>\n]{0,40}>")
_FORMULA = regex.compile(r"\$([^\s$](?:[^$\n]*[^\s$])?)\$(?!\d)")
_POWER = regex.compile(r"(?<=\d)[\u00B2\u00B3\u00B9\u2070-\u207F]+")
_IGNORE = regex.compile(r"[\p{Cf}\p{Variation_Selector}\u0640]|(?<=i)\u0307")
"""Marks to ignore: direction marks, joiners, soft hyphens, tatweel; İ folds to i."""
_MINUS = r"[-\u2010-\u2013\u2212]"
_LETTER = r"[\p{L}\p{M}\p{N}_]"
_BACK_MONEY = regex.compile(r"(?<![\p{Sc}\d_])(\d[\d_]*)\s?(\p{Sc})(?!\d)")
_TOKEN = regex.compile(
    rf"(?P<minus>(?<!{_LETTER}|[)\]]|\d\s){_MINUS}(?=\p{{Sc}}?\d)|(?<=(?<!{_LETTER})\p{{L}}{{1,2}}\d*)[-\u2212](?![-\p{{L}}\p{{N}}]))"
    rf"|(?P<sign>(?<!{_LETTER}|[)\]])\+(?=\d)|(?<=[\p{{L}}\p{{N}}+])\+|[±∓<>≤≥](?=\s?\d)|(?<=\d)\^(?=[-\d])"
    r"|\p{Sc}(?=\s?\d)|(?<=\d\s?)[%‰°′]|(?<=\p{L})[#♯♭](?![\p{L}\p{N}])"
    r"|(?<=(?<![\d/])\d{1,3})[/\u2044](?=\d{1,3}(?![\d/])))"
    rf"|(?P<word>{_LETTER}+)|\p{{So}}\p{{M}}*"
)
"""Words, pictographs, and signs that change an answer: in numbers (-5, 5%, $5, 20°, 1/2), grades and names
(A-, A+, C++, F#). A minus between words or spaces is a dash."""
_SPACE_IN_NUMBER = regex.compile(r"(?<=[±∓<>≤≥\p{Sc}])\s(?=\d)|(?<=\d)\s(?=[%‰°′])")
_PART = regex.compile(r"[\p{L}\p{M}\p{N}_\-+±∓<>≤≥^%‰°′#♭/\p{Sc}]")
"""Characters that continue a word in a normalised text."""
_SPACES = regex.compile(rf"(?<=[{UNSPACED}])\s+(?=[{UNSPACED}])")
_KATAKANA = regex.compile(r"\p{Word_Break=Katakana}")
_HANGUL = regex.compile(r"\p{Script=Hangul}")
_ARTICLES = frozenset({"a", "an", "the"})
_ABBREVIATION = re.compile(
    "bros|capt|col|dept|dr|ft|gen|gov|hon|jr|lt|messrs|mme|mr|mrs|ms|mt|prof|rev|sen|sgt|sr|st|ste|vs"
)
"""Abbreviations: words before a period that does not end a sentence."""
_OPENERS = re.compile(
    "he|she|it|they|we|you|i|this|that|these|those|there|the|in|on|at|its|his|her|their|but|and|however"
)
"""Words that usually begin a new sentence."""
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|no longer|cannot|(?:is|was|are|were|does|did|do|has|had|ca|wo)n t"
    r"|rather than|instead of|other than)"
    r"(?: (?:in|at|on|by|from|to|of|for|as|be|been|being|born|called|named|really|actually"
    r"|located|based|situated|found|known)){0,2} $"
)


def normalise(text: str, *, keep_articles: bool = False) -> str:
    """Fold case, width and punctuation, drop articles, join initials; numbers stay whole, meaningful signs stay.

    ``"The  U.K."`` becomes ``"uk"``, ``"J. K. Rowling"`` becomes ``"jk rowling"``, ``"1,200"`` ``"1200"``, and
    ``"3.5"`` ``"3_5"``, in which 3 does not match. ``"C++"``, ``"A-"``, ``"-5"`` and ``"5 %"`` keep their signs,
    letters their combining marks.
    """
    line = _INITIALS.sub(lambda match: re.sub(r"[.\s]", "", match[0]) + " ", _fold(text))
    line = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), line)
    line = _DECIMAL.sub(lambda match: f"{match[1] or match[3]}_{match[2] or match[4]}", line)
    line = _BACK_MONEY.sub(r"\2\1", line)
    parts, end = [], 0
    for match in _TOKEN.finditer(line):
        sign = "-" if match["minus"] else _SAME_SIGN.get(match[0], match[0])
        parts += [" " * (match.start() > end), sign]
        end = match.end()
    bare = _SPACE_IN_NUMBER.sub("", "".join(parts))
    return " ".join(word for word in bare.split() if keep_articles or word not in _ARTICLES)


_SAME_SIGN = {"♯": "#", "\u2044": "/"}


def _fold(text: str) -> str:
    """Fold case, Unicode forms and digits of a text, and remove formatting."""
    marked = _GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), _TAG.sub(" ", text))
    marked = _POWER.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), marked)
    marked = _FORMULA.sub(r" \1 ", marked)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", marked).casefold())
    folded = _IGNORE.sub("", folded).replace("٫", ".").replace("٬", ",")
    return regex.sub(r"[^\P{Nd}0-9]", lambda match: str(unicodedata.decimal(match[0])), folded)


def first_answer(text: str) -> str:
    """Return the first non-empty line, after a thinking block if there is one."""
    return next((line for line in after_thoughts(text).splitlines() if line.strip()), "").strip()


def first_sentence(line: str) -> str:
    """Return the first sentence of a line, including its final mark.

    The period of an initial ("J. K. Rowling"), of an abbreviation ("St. Louis"), and of one inside a sentence
    ("Washington D.C. and") does not end it. A mark of another script (。！？।؟) ends a sentence without a space
    after it.
    """
    for end in _END.finditer(line):
        before = line[: end.start()].split()[-1:]
        if end[1] == "." and before and _goes_on(before[0], line[end.end() :]):
            continue
        return line[: end.end()].rstrip()
    return line


def _goes_on(word: str, rest: str) -> bool:
    """Whether a sentence continues after a word with a period."""
    word = word.lstrip("\"'([")
    following = re.match(r"\S+", rest)
    if following is None:
        return False
    capital = following[0][0].isupper()
    if capital and _OPENERS.fullmatch(re.sub(r"\W", "", following[0]).casefold()):
        return False
    if word.casefold() == "no":
        return following[0][0].isdigit()
    if _ABBREVIATION.fullmatch(word.casefold()) or (len(word) == 1 and word.isupper()):
        return True
    return not capital and re.fullmatch(r"(?:[^\W\d_]\.)+[^\W\d_]", word) is not None


def says(text: str, answers: Sequence[str]) -> bool:
    """Whether any answer is asserted as whole words, starting within the first sentence of the text.

    "not X", "no longer X" and the like do not assert X; "not only X" does. Scripts without spaces between words are
    matched as substrings, with and without their spaces; an answer in Hangul may have a particle.
    """
    line = first_answer(text)
    sentence = first_sentence(line)
    for answer in answers:
        target = normalise(answer)
        articles = not target  # "A" as a grade or a blood group would be empty without its article
        if articles:
            target = normalise(answer, keep_articles=True)
        if not target:
            if _says_symbol(line, sentence, answer):
                return True
            continue
        forms = [normalise(one, keep_articles=articles) for one in (line, sentence)]
        if _asserts(target, *forms):
            return True
        close = [_SPACES.sub("", one) for one in (target, *forms)]
        if close != [target, *forms] and _asserts(close[0], close[1], close[2]):
            return True
    return False


def _asserts(target: str, text: str, sentence: str) -> bool:
    """Whether a normalised text contains a normalised answer, not negated, starting within its first sentence."""
    last = max(0, len(sentence) - 1)
    at = text.find(target)
    while 0 <= at <= last:
        end = at + len(target)
        separate = not _goes_together(text, at, target) and not _goes_together(text, end, target)
        if separate and not _NEGATION.search(text[:at]):
            return True
        at = text.find(target, at + 1)
    return False


def _goes_together(text: str, border: int, answer: str) -> bool:
    """Whether the characters on both sides of a position belong to one word, by Unicode word breaks (UAX #29).

    Unlike in Unicode, a Hangul word ends before its particle, and a number in Han digits is one word.
    """
    if border in (0, len(text)):
        return False
    before, after = text[border - 1], text[border]
    if regex.match(r"\p{M}", after):
        return True
    if not (_PART.match(before) and _PART.match(after)):
        return False
    if _KATAKANA.match(before) and _KATAKANA.match(after):
        return True
    if is_unspaced(before) or is_unspaced(after):
        return all(unicodedata.numeric(one, None) is not None for one in (before, after, *answer))
    particle = text[:border].endswith(answer) and _HANGUL.match(before) and _HANGUL.match(after)
    return not particle


def _says_symbol(line: str, sentence: str, answer: str) -> bool:
    """Whether an answer that consists of signs only is in the first sentence."""
    symbols = strip(answer)
    at = _fold(line).find(_fold(symbols)) if symbols else -1
    return 0 <= at < max(1, len(_fold(sentence)))


def answered(text: str, right: Sequence[str], wrong: Sequence[str] = ()) -> bool:
    """Whether a text gives a right answer and asserts no wrong one in the same sentence.

    A wrong answer that is part of a right one is ignored.
    """
    return says(text, right) and not asserts_old(text, right, wrong)


def asserts_old(text: str, right: Sequence[str], wrong: Sequence[str]) -> bool:
    """Whether a text asserts a wrong answer that is not part of a right one.

    Its mean over cases is the old-answer share, a sign of edits that take effect only partly.
    """
    inside_right = {w for w in wrong if any(says(r, [w]) for r in right)}
    return says(text, [w for w in wrong if w not in inside_right])


def exact(text: str, answers: Sequence[str]) -> bool:
    """Strict exact match: whether the first sentence is nothing else than an answer, after :func:`normalise`.

    The sentence, not the line, because the published protocol stops at a period.
    """
    line = first_answer(text)
    texts = {_key(line), _key(first_sentence(line))}
    return bool(texts & ({_key(answer) for answer in answers} - {""}))


def _key(text: str) -> str:
    """Normalise; keep articles if the result is otherwise empty, and signs if it is still empty."""
    key = normalise(text) or normalise(text, keep_articles=True) or strip(_fold(text))
    return _SPACES.sub("", key)
