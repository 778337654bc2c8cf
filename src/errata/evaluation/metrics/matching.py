"""Whether a free answer says what it should: alias matching on greedy text.

Source: the generation protocol of "The Mirage of Model Editing" (arXiv 2502.11177), natural stop and
no length given away, with deterministic matching instead of a judge.
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
"""The end of a sentence; marks other than . ! ? need no space behind them."""
_INITIALS = regex.compile(r"\b(?:[^\W\d_]\.\s*){2,}")
_THOUSANDS = regex.compile(r"(?<![\d.,])\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,]*\d)")
_GROUPED = regex.compile(r"(?<![\d.,])\d{1,3}(?:[\u00A0\u2009\u202F'’]\d{3})+(?!\d)")
_DECIMAL = regex.compile(r"(?<![\d.])(\d+)\.(\d+)(?!\.?\d)|(?<![\d.,])(\d+),(\d{1,2})(?![.,]?\d)")
_TAG = regex.compile(r"</?\p{L}[^<>\n]{0,40}>")
_FORMULA = regex.compile(r"\$([^\s$](?:[^$\n]*[^\s$])?)\$(?!\d)")
_POWER = regex.compile(r"(?<=\d)[\u00B2\u00B3\u00B9\u2070-\u207F]+")
_DROPPED = regex.compile(r"[\p{Cf}\p{Variation_Selector}\u0640]|(?<=i)\u0307")
"""Marks without a meaning of their own: direction marks, joiners, soft hyphens, tatweel; İ folds to i."""
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
"""Words, pictures, and the signs that make another answer: of numbers (-5, 5%, $5, 20°, 1/2), grades and names
(A-, A+, C++, F#). A minus between words or spaces is a dash."""
_ATTACHED = regex.compile(r"(?<=[±∓<>≤≥\p{Sc}])\s(?=\d)|(?<=\d)\s(?=[%‰°′])")
_PART = regex.compile(r"[\p{L}\p{M}\p{N}_\-+±∓<>≤≥^%‰°′#♭/\p{Sc}]")
"""What a word may go on with in a normalised text."""
_SPACES = regex.compile(rf"(?<=[{UNSPACED}])\s+(?=[{UNSPACED}])")
_KATAKANA = regex.compile(r"\p{Word_Break=Katakana}")
_HANGUL = regex.compile(r"\p{Script=Hangul}")
_ARTICLES = frozenset({"a", "an", "the"})
_SHORTENED = re.compile(
    "bros|capt|col|dept|dr|ft|gen|gov|hon|jr|lt|messrs|mme|mr|mrs|ms|mt|prof|rev|sen|sgt|sr|st|ste|vs"
)
"""Words that are written with a period and do not end a sentence."""
_OPENERS = re.compile(
    "he|she|it|they|we|you|i|this|that|these|those|there|the|in|on|at|its|his|her|their|but|and|however"
)
"""Words that begin a sentence and rarely go on with a name."""
_NEGATED = re.compile(
    r"\b(?:not|never|neither|nor|no longer|cannot|(?:is|was|are|were|does|did|do|has|had|ca|wo)n t"
    r"|rather than|instead of|other than)"
    r"(?: (?:in|at|on|by|from|to|of|for|as|be|been|being|born|called|named|really|actually"
    r"|located|based|situated|found|known)){0,2} $"
)


def normalise(text: str, *, keep_articles: bool = False) -> str:
    """Fold case, width and punctuation, drop articles, join initials, keep numbers whole and signs that mean.

    ``"The  U.K."`` becomes ``"uk"``, ``"J. K. Rowling"`` becomes ``"jk rowling"``, ``"1,200"`` ``"1200"``, and
    ``"3.5"`` ``"3_5"``, in which no 3 is found. ``"C++"``, ``"A-"``, ``"-5"`` and ``"5 %"`` keep their signs,
    letters their combining marks.
    """
    joined = _INITIALS.sub(lambda match: re.sub(r"[.\s]", "", match[0]) + " ", _folded(text))
    joined = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), joined)
    joined = _DECIMAL.sub(lambda match: f"{match[1] or match[3]}_{match[2] or match[4]}", joined)
    joined = _BACK_MONEY.sub(r"\2\1", joined)
    parts, end = [], 0
    for match in _TOKEN.finditer(joined):
        sign = "-" if match["minus"] else _SAME_SIGN.get(match[0], match[0])
        parts += [" " * (match.start() > end), sign]
        end = match.end()
    bare = _ATTACHED.sub("", "".join(parts))
    return " ".join(word for word in bare.split() if keep_articles or word not in _ARTICLES)


_SAME_SIGN = {"♯": "#", "\u2044": "/"}


def _folded(text: str) -> str:
    """Fold case, forms and digits of a text, and take out what only formats it."""
    marked = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), _TAG.sub(" ", text))
    marked = _POWER.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), marked)
    marked = _FORMULA.sub(r" \1 ", marked)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", marked).casefold())
    folded = _DROPPED.sub("", folded).replace("٫", ".").replace("٬", ",")
    return regex.sub(r"[^\P{Nd}0-9]", lambda match: str(unicodedata.decimal(match[0])), folded)


def first_answer(text: str) -> str:
    """Return the first line that holds text, behind a thinking block if there is one."""
    return next((line for line in after_thoughts(text).splitlines() if line.strip()), "").strip()


def first_sentence(line: str) -> str:
    """Return a line up to the end of its first sentence, with the mark that ends it.

    The period of an initial ("J. K. Rowling"), of a shortened word ("St. Louis") and of an abbreviation
    that the sentence goes on after ("Washington D.C. and") ends nothing. A mark of another script (。！？।؟)
    ends a sentence without a space behind it.
    """
    for end in _END.finditer(line):
        before = line[: end.start()].split()[-1:]
        if end[1] == "." and before and _goes_on(before[0], line[end.end() :]):
            continue
        return line[: end.end()].rstrip()
    return line


def _goes_on(word: str, rest: str) -> bool:
    """Whether a sentence goes on after a word with a period."""
    word = word.lstrip("\"'([")
    following = re.match(r"\S+", rest)
    if following is None:
        return False
    capital = following[0][0].isupper()
    if capital and _OPENERS.fullmatch(re.sub(r"\W", "", following[0]).casefold()):
        return False
    if word.casefold() == "no":
        return following[0][0].isdigit()
    if _SHORTENED.fullmatch(word.casefold()) or (len(word) == 1 and word.isupper()):
        return True
    return not capital and re.fullmatch(r"(?:[^\W\d_]\.)+[^\W\d_]", word) is not None


def says(text: str, answers: Sequence[str]) -> bool:
    """Whether any answer is asserted as whole words, starting within the first sentence of the text.

    "not X", "no longer X" and their like do not assert X; "not only X" does. Scripts without spaces between
    words are matched by text, with and without what spaces stand there; an answer in Hangul may have a particle.
    """
    line = first_answer(text)
    sentence = first_sentence(line)
    for answer in answers:
        expected = normalise(answer)
        articles = not expected  # "A" as a mark or a blood group: without articles nothing would be left
        if articles:
            expected = normalise(answer, keep_articles=True)
        if not expected:
            if _says_symbol(line, sentence, answer):
                return True
            continue
        forms = [normalise(one, keep_articles=articles) for one in (line, sentence)]
        if _asserted(expected, *forms):
            return True
        close = [_SPACES.sub("", one) for one in (expected, *forms)]
        if close != [expected, *forms] and _asserted(close[0], close[1], close[2]):
            return True
    return False


def _asserted(expected: str, whole: str, sentence: str) -> bool:
    """Whether a normalised answer stands in a normalised text, not denied, beginning within its first sentence."""
    last = max(0, len(sentence) - 1)
    at = whole.find(expected)
    while 0 <= at <= last:
        end = at + len(expected)
        apart = not _goes_together(whole, at, expected) and not _goes_together(whole, end, expected)
        if apart and not _NEGATED.search(whole[:at]):
            return True
        at = whole.find(expected, at + 1)
    return False


def _goes_together(text: str, border: int, answer: str) -> bool:
    """Whether the characters on both sides of a place belong to one word, as Unicode breaks words (UAX #29).

    Unlike there, a Hangul word ends before its particle, and a number in Han digits is one word.
    """
    if border in (0, len(text)):
        return False
    left, right = text[border - 1], text[border]
    if regex.match(r"\p{M}", right):
        return True
    if not (_PART.match(left) and _PART.match(right)):
        return False
    if _KATAKANA.match(left) and _KATAKANA.match(right):
        return True
    if is_unspaced(left) or is_unspaced(right):
        return all(unicodedata.numeric(one, None) is not None for one in (left, right, *answer))
    particle = text[:border].endswith(answer) and _HANGUL.match(left) and _HANGUL.match(right)
    return not particle


def _says_symbol(line: str, sentence: str, answer: str) -> bool:
    """Whether an answer of signs alone stands in a text by itself."""
    expected = strip(answer)
    at = _folded(line).find(_folded(expected)) if expected else -1
    return 0 <= at < max(1, len(_folded(sentence)))


def answered(text: str, right: Sequence[str], wrong: Sequence[str] = ()) -> bool:
    """Whether a text gives a right answer and asserts none of the wrong ones in the same sentence.

    A wrong answer that is part of a right one does not count.
    """
    return says(text, right) and not asserts_old(text, right, wrong)


def asserts_old(text: str, right: Sequence[str], wrong: Sequence[str]) -> bool:
    """Whether a text asserts a wrong answer that is no part of a right one.

    Its mean over cases is the old-answer share, the sign of an edit that holds in part.
    """
    contained = {w for w in wrong if any(says(r, [w]) for r in right)}
    return says(text, [w for w in wrong if w not in contained])


def exact(text: str, answers: Sequence[str]) -> bool:
    """Whether the first sentence is an answer and nothing else, after :func:`normalise`.

    Strict exact match. The sentence and not the line, because the published protocol stops at a period.
    """
    line = first_answer(text)
    texts = {_key(line), _key(first_sentence(line))}
    return bool(texts & ({_key(answer) for answer in answers} - {""}))


def _key(text: str) -> str:
    """Normalise, keeping articles where nothing else is left and signs where nothing at all is."""
    key = normalise(text) or normalise(text, keep_articles=True) or strip(_folded(text))
    return _SPACES.sub("", key)
