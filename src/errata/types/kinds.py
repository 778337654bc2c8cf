"""The table of probe kinds: what each measures, and how observers, scores, tables and pages treat it.

A dataset may use kinds that the table does not list: they belong to the group :data:`DEFAULT_GROUP`, or to ``kept``
where a table sees that none of their answers is meant to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Group = Literal["learned", "kept", "follows", "other"]
"""What a kind of probe is about: the edit itself (learned), what must not change (kept), consequences of the edit
(follows), or neither (other)."""

DEFAULT_GROUP: Group = "follows"
"""Group of kinds that the table does not list."""

EFFICACY = "efficacy"
"""The kind that asks the edited request itself, in its own words."""
CONDITION = "condition"
"""The kind that the unedited host must answer for the other probes of its group to count."""


@dataclass(frozen=True)
class Kind:
    """One kind of probe."""

    name: str
    group: Group
    description: str = ""
    """What such a probe asks."""
    label: str = ""
    """Name in tables; by default the name with spaces."""
    short_label: str = ""
    """Name in narrow tables; by default the label."""
    main: bool = False
    """Whether it has a column in a report's first table; the others follow in a second one."""
    headline: int | None = None
    """Which part of the headline it is, from 1; of several kinds of one part the first that was evaluated counts."""
    distribution: bool = False
    """Whether the distribution of the next token is observed, which KL divergence needs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name.replace("_", " "))
        object.__setattr__(self, "short_label", self.short_label or self.label)


_ALL = (
    Kind(EFFICACY, "learned", "the edited request itself", main=True, headline=1),
    Kind("paraphrase", "learned", "the request in other words", main=True, headline=2),
    Kind("paraphrase_seen", "learned", "the request in words that the model was trained on"),
    Kind("question", "learned", "the request as a question"),
    Kind("persona", "learned", "the request as some speaker would put it"),
    Kind("long", "learned", "a whole text that was taught"),
    Kind("long_paraphrase", "learned", "a whole text that was taught, asked for in other words"),
    Kind("current", "learned", "the request, asked of today"),
    Kind("explicit_time", "learned", "the request, asked of a year since which it holds"),
    Kind("neighbourhood", "kept", "the same relation of another subject", short_label="neighbours", main=True,
         headline=3, distribution=True),
    Kind("locality", "kept", "an unrelated fact", main=True, headline=3),
    Kind("same_subject", "kept", "another relation of the same subject", main=True, headline=4),
    Kind("historical", "kept", "the request, asked of a year before it held"),
    Kind("distracting", "kept", "a neighbour, with the edit stated before the prompt", distribution=True),
    Kind("other_task", "kept", "a question of another task, e.g. of common sense"),
    Kind("relation_specificity", "kept", "other facts of the same subject (RippleEdits)"),
    Kind("forgetfulness", "kept", "other objects of the same relation (RippleEdits)"),
    Kind("entity_locality", "kept", "a text about another entity"),
    Kind("cross_efficacy", "learned", "the edited request in another language", label="other language", main=True),
    Kind("cross_paraphrase", "learned", "the request in other words of another language"),
    Kind("cross_question", "learned", "the request as a question in another language"),
    Kind("cross_neighbourhood", "kept", "the same relation of another subject, in another language"),
    Kind("cross_locality", "kept", "an unrelated fact in another language"),
    Kind("cross_same_subject", "kept", "another relation of the same subject, in another language"),
    Kind("other_view", "learned", "the request beside another picture of the same thing", main=True),
    Kind("picture_subject", "learned", "the request with the picture in its subject's place"),
    Kind("other_picture", "kept", "the request beside a picture of another thing", main=True, distribution=True),
    Kind("no_picture", "kept", "the request beside no picture, whose words alone must not have the new answer",
         main=True, distribution=True),
    Kind("picture_locality", "kept", "an unrelated question beside another picture", distribution=True),
    Kind("question_kept", "kept", "a question whose answer the edit must not change"),
    Kind("restated", "kept", "another fact of the subject, of which the edited fact is a restatement"),
    Kind("former", "follows", "what the request replaced, asked as what was true once, without a year"),
    Kind("alias", "follows", "the request with another name of the subject"),
    Kind("by_name", "follows", "the request by the name of what its picture shows, in text alone", main=True),
    Kind("inverse", "follows", "the inverse relation, from the new object to the subject"),
    Kind("one_hop", "follows", "a fact of the new object, asked through the subject"),
    Kind("cross_one_hop", "follows", "a fact of the new object, asked through the subject in another language"),
    Kind("two_hop", "follows", "a fact two relations beyond the new object"),
    Kind("multi_hop", "follows", "a question whose answer needs the edit and further facts"),
    Kind("hop", "follows", "one step of a multi-hop question"),
    Kind("logical", "follows", "what follows from the edit by a rule"),
    Kind("logical_generalization", "follows", "what follows from the edit by a rule (RippleEdits)"),
    Kind("compositionality_1", "follows", "a fact of the new object, asked through the subject (RippleEdits)"),
    Kind("compositionality_2", "follows", "the new object, asked through a subject two steps away (RippleEdits)"),
    Kind("subject_aliasing", "follows", "the request with another name of the subject (RippleEdits)"),
    Kind("portability", "follows", "any consequence of the edit"),
    Kind("sub_question", "follows", "a question about one part of a text that was taught"),
    Kind("entity", "follows", "a text about the entity whose definition was taught"),
    Kind("word_problem", "follows", "a problem that uses the arithmetic that was taught"),
    Kind(CONDITION, "other", "what the unedited model must know for a test to count (RippleEdits)"),
    Kind("bias", "other", "which pronoun follows a sentence about a profession"),
    Kind("coreference", "other", "which of two people a pronoun means (WinoBias)"),
    Kind("stereotype", "other", "which of three sentences about a group is more probable (StereoSet)"),
    Kind("generation", "other", "running text about the subject, of which nothing particular is expected"),
)  # fmt: skip

KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in _ALL})
"""Every known kind by name, in the order of columns in tables."""


def kind_of(name: str) -> Kind:
    """Return the record of a kind, whatever follows its first period (``multi_hop.any``, ``multi_hop.thought``).

    A kind that the table does not list has the group :data:`DEFAULT_GROUP` and its own name as label.
    """
    bare = name.partition(".")[0]
    return KINDS.get(bare) or Kind(bare, DEFAULT_GROUP)
