"""Whether a free answer says what it should: alias matching on greedy text.

Source: the generation protocol of "The Mirage of Model Editing" (arXiv 2502.11177), natural stop and
no length given away, with deterministic matching instead of a judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence

_END = re.compile(r"([.!?])[\"')\]]*(\s+|$)")
_INITIALS = re.compile(r"\b(?:[^\W\d_]\.\s*){2,}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,]*\d)")
_DECIMAL = re.compile(r"(?<![\d.])(\d+)\.(\d+)(?!\.?\d)")
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
    """Fold case, width and punctuation, drop articles, join initials, keep numbers whole.

    ``"The  U.K."`` becomes ``"uk"``, ``"J. K. Rowling"`` becomes ``"jk rowling"``, ``"1,200"`` ``"1200"``, and
    ``"3.5"`` ``"3_5"``, in which no 3 is found.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    joined = _INITIALS.sub(lambda found: re.sub(r"[.\s]", "", found[0]) + " ", folded)
    joined = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), joined)
    joined = _DECIMAL.sub(r"\1_\2", joined)
    words = re.sub(r"[^\w\s]", " ", joined).split()
    return " ".join(word for word in words if keep_articles or word not in _ARTICLES)


def first_answer(text: str) -> str:
    """Return the first line that holds text."""
    return next((line for line in text.splitlines() if line.strip()), "").strip()


def first_sentence(line: str) -> str:
    """Return a line up to the end of its first sentence, with the mark that ends it.

    The period of an initial ("J. K. Rowling"), of a shortened word ("St. Louis") and of an abbreviation
    that the sentence goes on after ("Washington D.C. and") ends nothing.
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

    "not X", "no longer X" and their like do not assert X; "not only X" does.
    """
    line = first_answer(text)
    sentence = first_sentence(line)
    for answer in answers:
        wanted = normalise(answer)
        articles = not wanted  # "A" as a mark or a blood group: without articles nothing would be left
        if articles:
            wanted = normalise(answer, keep_articles=True)
        if not wanted:
            continue
        whole = normalise(line, keep_articles=articles)
        last = max(0, len(normalise(sentence, keep_articles=articles)) - 1)
        for match in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", whole):
            if match.start() <= last and not _NEGATED.search(whole[: match.start()]):
                return True
    return False


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
    said = {_key(line), _key(first_sentence(line))}
    return bool(said & ({_key(answer) for answer in answers} - {""}))


def _key(text: str) -> str:
    """Normalise, keeping articles where nothing else is left."""
    return normalise(text) or normalise(text, keep_articles=True)


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether any answer occurs in a text as a string of characters (legacy, arXiv 2307.12976).

    Quirks kept: letters are compared with their case, "Esk" is found in "Eskdale", and the whole output
    counts however long it is. RippleEdits' code also leaves the prompt in the text it searches; give the
    prompt and the continuation together to repeat that.
    """
    return any(answer in text for answer in answers)


def token_set_f1(said: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """F1 of two sets of tokens, 2 |A and B| / (|A| + |B|), as GRACE scores generations (arXiv 2211.11031).

    Quirk: sets, so order and repetition do not count: "a b" and "b a a a" score 1. 0 where both are empty.
    """
    a, b = set(said), set(wanted)
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 0.0
