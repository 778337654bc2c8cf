"""Frozen records that every room uses. Importing them loads the standard library only."""

from errata.types.asking import DEFAULT_ASK, AskOptions
from errata.types.concept import Concept, ConceptRecord, LabelledText
from errata.types.contrast import ContrastPair, Contrasts
from errata.types.image import ImageRecord, ImageRequest, image_problems
from errata.types.kinds import KINDS, Kind, kind_of
from errata.types.picture import IMAGE, Picture, marks, placed_in
from errata.types.resources import Corpus, Gallery, Resources
from errata.types.text import (
    SLOT,
    Case,
    Form,
    Observation,
    Probe,
    Request,
    Row,
    is_date,
    plain_case,
    plain_probe,
    request_problems,
    subject_forms,
)

__all__ = [
    "DEFAULT_ASK",
    "IMAGE",
    "KINDS",
    "SLOT",
    "AskOptions",
    "Case",
    "Concept",
    "ConceptRecord",
    "ContrastPair",
    "Contrasts",
    "Corpus",
    "Form",
    "Gallery",
    "ImageRecord",
    "ImageRequest",
    "Kind",
    "LabelledText",
    "Observation",
    "Picture",
    "Probe",
    "Request",
    "Resources",
    "Row",
    "image_problems",
    "is_date",
    "kind_of",
    "marks",
    "placed_in",
    "plain_case",
    "plain_probe",
    "request_problems",
    "subject_forms",
]
