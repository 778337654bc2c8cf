"""Free answers: sentence ends, initials, negation, strict match, and the legacy ways."""

# ruff: noqa: E501 (wide letters count twice)

from __future__ import annotations

import unicodedata

import pytest

from errata.evaluation.metrics import matching


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("J. K. Rowling wrote it. Esk is far.", "J. K. Rowling wrote it."),
        ("It is J. K. Rowling. He agrees.", "It is J. K. Rowling."),
        ("in Washington D.C. and nowhere else. Esk.", "in Washington D.C. and nowhere else."),
        ("in Washington D.C. Esk is far.", "in Washington D.C."),
        ("in St. Louis, yes. Esk.", "in St. Louis, yes."),
        ("lives on Main St. The town is Esk.", "lives on Main St."),
        ("Dr. Mary Vale! Esk.", "Dr. Mary Vale!"),
        ("at No. 5 of the street. Esk", "at No. 5 of the street."),
        ("No. Esk", "No."),
        ("about 3.5 miles. Esk", "about 3.5 miles."),
        ("no end at all", "no end at all"),
        ("Malcolm X. He was Esk.", "Malcolm X."),
    ],
)
def test_a_sentence_ends_where_it_ends(line, sentence):
    assert matching.first_sentence(line) == sentence


@pytest.mark.parametrize("spelled", ["J. K. Rowling", "J.K. Rowling", "JK Rowling", "J.K.  ROWLING"])
def test_initials_are_spelled_many_ways(spelled):
    assert matching.says(f" {spelled}, of course.", ["J. K. Rowling"])
    assert matching.exact(f" {spelled}.", ["J. K. Rowling"])
    assert not matching.says("J K Rowling", ["J. K. Rowling"]), "without periods they are words"


def test_an_answer_after_an_initial_is_in_the_first_sentence():
    assert matching.says(" It is J. K. Rowling.", ["Rowling"])
    assert matching.says(" Washington D.C. and Esk.", ["Esk"])
    assert not matching.says(" Washington D.C. Esk is far.", ["Esk"])


@pytest.mark.parametrize(
    ("text", "asserted"),
    [
        ("not Esk", False), ("not in Esk", False), ("She was not born in Esk.", False), ("It isn't Esk.", False),
        ("It is no longer Esk", False), ("rather than Esk", False), ("never in the Esk", False),
        ("not located in Esk", False), ("not only Esk", True), ("not far from here is Esk", True),
        ("No, Esk", True), ("nothing but Esk", True),
        ("not Esk? Yes, Esk", False), ("not Esk, or is it Esk", True), ("Knot Esk", True),
    ],
)  # fmt: skip
def test_what_is_denied_is_not_asserted(text, asserted):
    assert matching.says(text, ["Esk"]) is asserted


def test_denying_the_old_answer_is_no_fault():
    assert matching.answered("Tallow, not Esk.", ["Tallow"], ["Esk"])
    assert not matching.answered("Esk, not Tallow.", ["Tallow"], ["Esk"])
    assert matching.asserts_old("Esk, not Tallow.", ["Tallow"], ["Esk"])
    assert not matching.asserts_old("Tallow, not Esk.", ["Tallow"], ["Esk"])
    assert not matching.asserts_old("New Esk", ["New Esk"], ["Esk"]), "part of the right answer"


def test_normal_forms():
    assert matching.normalise("The  U.K.") == "uk" == matching.normalise("UK")
    assert matching.normalise("ｅｓｋ　①") == "esk 1", "NFKC"
    assert matching.normalise("O’Brien") == matching.normalise("O'Brien")
    assert matching.normalise("The A", keep_articles=True) == "the a"
    assert matching.says("The grade is A", ["A"]), "an answer that is an article"


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("3.5 million", "3", False), ("3.5 million", "5", False), ("3.5 million", "3.5", True),
        ("1,200 people", "200", False), ("1,200 people", "1200", True), ("1200", "1,200", True),
        ("12,345,678", "12345678", True), ("in 1990, 200 people", "200", True), ("in May 5,1990", "1990", True),
        ("on 3.12.1990", "1990", True), ("It is 3. Esk", "3", True), ("1, 2, 3", "2", True),
    ],
)  # fmt: skip
def test_a_number_is_no_part_of_another(text, answer, right):
    assert matching.says(text, [answer]) is right


def test_strict_match_wants_the_answer_and_nothing_else():
    assert matching.exact(" The Silver Road.", ["Silver Road"])
    assert matching.exact("Tallow. Esk is far.", ["Tallow"]), "the published protocol stops at a period"
    assert not matching.exact("in Tallow.", ["Tallow"])
    assert not matching.exact("", ["Tallow"]) and not matching.exact("the", [""])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("吴芳写的。", "吴芳"), ("富士山です", "富士山"), ("부산이다", "부산"), ("ไนล์ไหลผ่าน", "ไนล์"), ("ရန်ကုန်မြို့", "ရန်ကုန်"),
        ("作者是Tim Cook写的", "Tim Cook"), ("他今年25岁", "25"), ("吴 芳", "吴芳"), ("レオナルド・ダ・ヴィンチ作", "レオナルド ダ ヴィンチ"),
        ("राम है।", "राम"), (unicodedata.normalize("NFD", "ở Hà Nội"), "Hà Nội"), (unicodedata.normalize("NFD", "부산이다"), "부산"),
        ("باريس\u200f", "باريس"), ("٢٥ سنة", "25"), ("１２３", "123"), ("C++.", "C++"), ("−5 degrees", "-5"), ("5 %", "5%"),
        ("5 €", "€5"), ("20 °C", "20°C"), ("B♭ major", "B♭"), ("Na+ ions", "Na+"), ("It is +", "+"), ("😀", "😀"), ("3,5", "3.5"),
        ("**Paris**", "Paris"), ("<b>Paris</b>", "Paris"), ("$5$", "5"), ("l'Italie", "Italie"), ("„Wien“", "Wien"), ("- 5", "5"),
        ("Spanish-born", "Spanish"), ("A-level", "A"), ("born 1939-1945", "1945"), ("<think>\nEsk\n</think>\n\nTallow.", "Tallow"),
    ],
)  # fmt: skip
def test_right_answers_of_all_writings_are_right(text, answer):
    assert matching.says(text, [answer])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("C#", "C++"), ("C++", "C"), ("A-", "A+"), ("A−", "A"), ("5", "-5"), ("-5", "5"), ("F", "F#"), ("B♭", "B"), ("5%", "5"), ("€5", "$5"),
        ("20°C", "20°F"), ("1/2", "1"), ("10²", "102"), ("3,5", "3"), ("UTC-5", "UTC+5"), ("+", "-"), ("😀", "😁"), ("Disney", "Disney+"),
        ("रोम", "राम"), ("तमिल", "तमल"), ("นี้", "นี"), (unicodedata.normalize("NFD", "Zoé"), "Zoe"), ("パリス・ヒルトン", "パリ"), ("二十五", "二十"),
        ("北京。上海", "上海"), ("दिल्ली। मुंबई", "मुंबई"), ("동서울", "서울"), ("<think>Esk", "Esk"), ("<think>Esk</think>Tallow", "Esk"),
    ],
)  # fmt: skip
def test_what_differs_in_a_sign_or_mark_is_another_answer(text, answer):
    assert not matching.says(text, [answer])
    assert not matching.exact(text, [answer])


def test_strict_match_in_scripts_without_spaces():
    assert matching.exact("吴芳。她写的", ["吴芳"]) and not matching.exact("吴芳写的。", ["吴芳"])
    assert matching.exact("5 %", ["5%"]) and matching.exact("「大阪」", ["大阪"])


def test_combining_marks_stay_on_their_letters():
    """Each mark of a script tells two words apart; none is lost, whatever Python's own \\w takes for a letter."""
    for code in range(0x900, 0x1100):
        mark = chr(code)
        if unicodedata.category(mark) in ("Mn", "Mc") and unicodedata.normalize("NFKC", mark) == mark:
            assert matching.normalise(f"क{mark}ख") != matching.normalise("कख"), hex(code)
            assert not matching.says(f"क{mark}", ["क"]), hex(code)
