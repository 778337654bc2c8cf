"""How texts are written: the join of prompt and answer, sentence ends, invisible marks, thinking blocks."""

# ruff: noqa: E501 (wide letters count twice)

from __future__ import annotations

import sys
import unicodedata

import pytest
import regex

from errata import writing
from errata.host import stopping
from errata.writing import joint, statement

GLUED = [
    # scripts without spaces
    ("长城在", "北方"), ("日本で一番高い山は", "富士山"), ("แม่น้ำที่ยาวที่สุดคือ", "ไนล์"), ("ເມືອງຫຼວງແມ່ນ", "ວຽງຈັນ"),
    ("រាជធានីគឺ", "ភ្នំពេញ"), ("မြို့တော်မှာ", "နေပြည်တော်"), ("长城在 ", "北方"), ("长城在", "\u200b 北方 "),
    ("作者是", "Shakespeare"), ("价格是", "5元"), ("他今年25", "岁"), ("《红楼梦》", "的作者"), ("他说：“", "好"), ("他来自", "🇫🇷"),
    ("答：", "北京"), ("答:", "北京"), ("東京(Tokyo)", "は"), ("１２", "個"), ("Wat is 「", "大阪"),
    # opening marks of all languages
    ('He said "', "yes"), ("elle dit «", "oui"), ("Er sagte „", "ja"), ("Das Buch »", "Faust"), ("De titel is ‘", "Max"), ("(", "a"),
    ("[", "x"), ("¿", "Qué"), ("The code is `", "x"), ("The answer is **", "Paris"),
    # elisions
    ("la capitale de l'", "Italie"), ("la capitale d’", "Italie"), ("la storia dell'", "arte"), ("parce qu'", "il"), ("Mr O'", "Brien"),
    # signs
    ("It costs $", "5"), ("It costs €", "5"), ("and/", "or"), ("well-", "known"), ("It is -", "5"), ("user@", "example.org"),
    ("see #", "12"), ("snake_", "case"), ("2+2=", "4"), ("about ~", "5"), ("1939–", "1945"), ("12:", "30"), ("Pi is 3.", "14"),
    # what belongs to the text before it
    ("rate is 50", "%"), ("It is 20", "°C"), ("Ada", "'s mother"), ("दिल्ली", "।"), ("Is it so", "؟"), ("Esk", ", he said"),
    # line ends, labels without a space
    ("Answer:\n", "Esk"), ("Q:Where?\nA:", "Tallow"), ("长城\u3000", "北方"),
]  # fmt: skip
SPACED = [
    ("born in", "Esk"), ("born in ", "Esk"), ("born in", " Esk "), ("한국의 수도는", "서울"), ("भारत की राजधानी", "दिल्ली"),
    ("عاصمة فرنسا هي\u200f", "باريس"), ("בירת צרפת היא", "פריז"), ("Thủ đô là", "Hà Nội"), (unicodedata.normalize("NFD", "Thủ đô là"), "Huế"),
    ("Столица", "Москва"), ("The capital of Japan is", "東京"), ("He is 25", "岁"), ("Q: 日本の首都は?\nA:", "東京"), ("Answer:", "東京"),
    ("苹果 iPhone 的 CEO 是", "Tim"), ("He lives in 東京", "with"), ("Tokyo (東京)", "means"), ("答: ", "北京"),
    ('He said "yes"', "to"), ("Er sagte „ja“", "und"), ("elle dit « oui »", "à"), ("He said 'come in'", "to"), ("`x`", "is"),
    ("**Answer:**", "Paris"), ("un po'", "di"), ("the Smiths'", "house"), ("He was goin'", "home"), ("was", "'quoted'"),
    ("is", "«Faust»"), ("Das Buch heißt", "»Faust«"), ("costs 5 €", "a day"), ("the language C#", "was"), ("C++", "is"), ("A+", "is"),
    ("2 + 2 =", "4"), ("A ->", "B"), ("He is –", "a man"), ("5%", "of"), ("100+", "people"), ("Where?", "Esk"), ("works with", ".NET"),
    ("is", ".5"), ("I ❤️", "NY"), ("The flag is", "🇫🇷"), ("The cost is", "$5"), ('a 27"', "screen"),
]  # fmt: skip

EVERY_CHARACTER = "".join(map(chr, range(sys.maxunicode + 1)))


@pytest.mark.parametrize(("prompt", "answer"), GLUED)
def test_no_space_is_made_up(prompt, answer):
    text, at = joint(prompt, answer)
    assert text == prompt.rstrip(" \t") + writing.strip(answer)
    assert text[at:] == writing.strip(answer)


@pytest.mark.parametrize(("prompt", "answer"), SPACED)
def test_a_space_where_the_writing_wants_one(prompt, answer):
    text, at = joint(prompt, answer)
    assert text == f"{prompt.rstrip()} {answer.strip()}"
    assert text[at:] == answer.strip()


def test_a_setting_overrules_the_writing():
    assert joint("长城在", "北方", "space") == ("长城在 北方", 4)
    assert joint("born in", "Esk", "none") == ("born inEsk", 7)
    assert joint("born in ", "Esk", "none") == ("born in Esk", 8)
    assert joint("[/INST]", "Esk", lead=" ") == ("[/INST] Esk", 8)
    assert joint("[/INST]", "Esk", "none", lead=" ")[0] == "[/INST]Esk"


def test_letters_without_spaces_are_those_that_unicode_does_not_join_to_words():
    """UAX #29 has no word of several letters for them: Word_Break is Other, or Katakana."""
    unspaced = regex.compile(rf"[{writing.UNSPACED}]")
    letters = regex.findall(r"(?V1)[\p{Lo}&&[\p{Word_Break=Other}\p{Word_Break=Katakana}]]", EVERY_CHARACTER)
    assert len(letters) > 90_000
    missing = [one for one in letters if not unspaced.match(one)]
    assert not missing, [f"{ord(one):x}" for one in missing[:20]]
    for joined in (
        r"\p{Latin}",
        r"\p{Cyrillic}",
        r"\p{Hangul}",
        r"\p{Arabic}",
        r"\p{Devanagari}",
        r"\p{Ethiopic}",
    ):
        some = regex.findall(rf"(?V1)[{joined}&&\p{{L}}]", EVERY_CHARACTER)
        assert some and not any(map(unspaced.match, some)), joined


def test_every_sentence_terminal_ends_a_sentence():
    from errata.evaluation.metrics.matching import first_sentence

    marks = regex.findall(r"\p{Sentence_Terminal}", EVERY_CHARACTER)
    assert len(marks) > 100 and set("。！？।؟።။។") <= set(marks)
    for mark in marks:
        if mark in ".!?":
            assert first_sentence(f"Esk{mark} More") == f"Esk{mark}"
        elif mark != "．":  # also the decimal point of full-width digits
            assert first_sentence(f"Esk{mark}More") == f"Esk{mark}", hex(ord(mark))
            assert stopping.is_complete(f"Esk{mark}More", "sentence"), hex(ord(mark))


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("大阪。", False), ("大阪。東", True), ("「大阪。", False), ("「大阪。」", False), ("「大阪。」と", True), ("३.५ किलो", False),
        ("दिल्ली। य", True), ("نعم؟ ل", True), ("값은 3.5", False), ("３．５メートル", False), ("Esk. It is far away, they", True),
        ("<think>\nIt is 東京。No", False), ("<think>\nx\n</think>\n\n大阪。東", True),
    ],
)  # fmt: skip
def test_where_a_free_answer_ends(text, done):
    assert stopping.is_complete(text, "sentence") is done


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>\na\n</think>\n\nEsk", "\n\nEsk"), ("thoughts</think>Esk", "Esk"), ("<think>never ends", ""), ("Esk", "Esk"),
        ("[THINK]a[/THINK]Esk", "Esk"), ("◁think▷a◁/think▷Esk", "Esk"), ("I <think> so", "I <think> so"),
    ],
)  # fmt: skip
def test_an_answer_stands_behind_the_thinking_block(text, rest):
    assert writing.after_thoughts(text) == rest


def test_sentences_end_in_the_stop_of_their_script():
    assert statement("长城在", "北方") == "长城在北方。"
    assert statement("भारत की राजधानी", "दिल्ली") == "भारत की राजधानी दिल्ली।"
    assert statement("born in ", "Esk") == "born in Esk." == statement("born in", "Esk.")
    assert statement("แม่น้ำคือ", "ไนล์") == "แม่น้ำคือไนล์"


@pytest.mark.parametrize(
    "space", [" ", "\u00a0", "\u3000", "\t", "\n", "\u200b", "\u200f", "\ufeff", "\u2067"]
)
def test_targets_are_stripped_of_what_cannot_be_seen(space):
    import errata

    request = errata.Request("{} was born in", "Ada", f"{space}Esk{space}", f"Merrin{space}")
    assert (request.target, request.target_old) == ("Esk", "Merrin")
    with pytest.raises(errata.ErrataError, match="target is empty"):
        errata.Request("{} was born in", "Ada", space)


@pytest.mark.parametrize("subject", ["Zoé Brenner", "Hà Nội", "서울", "Ångström", "Ђорђе Ћопић", "ガンダム"])
def test_a_subject_is_found_in_either_unicode_form(subject):
    import errata

    forms = [unicodedata.normalize(form, subject) for form in ("NFC", "NFD")]
    for one in forms:
        for other in forms:
            request = errata.Request(f"«{one}» is", other, "Esk")
            assert request.subject == one and request.text == f"«{one}» is"
            assert request.text[slice(*request.span)] == one


def test_a_letter_is_not_the_letter_with_an_accent():
    import errata

    with pytest.raises(errata.ErrataError, match="does not occur in prompt"):
        errata.Request(unicodedata.normalize("NFD", "Zoé was"), "Zoe", "Esk")
    assert errata.Request("Zoe and Zoe\u0301 were", "Zoe", "Esk").span == (0, 3)
