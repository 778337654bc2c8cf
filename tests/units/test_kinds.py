"""The table of probe kinds, and what reads it."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from errata import types
from errata.report import kinds as tables
from errata.types.kinds import DEFAULT_GROUP, KINDS, Group, Kind, kind_of


def test_every_kind_is_told_in_full():
    for name, kind in KINDS.items():
        assert kind.name == name and kind.group in get_args(Group) and kind.description and kind.label
        assert "." not in name, "what follows a period says how probes were put together"
    with pytest.raises(TypeError):
        KINDS["mine"] = Kind("mine", "kept")  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        KINDS["efficacy"].group = "kept"  # type: ignore[misc]


def test_a_kind_is_found_whatever_follows_its_name():
    assert kind_of("multi_hop.thought.any") is KINDS["multi_hop"]
    unknown = kind_of("locality_topic.any")
    assert (unknown.name, unknown.group, unknown.label) == ("locality_topic", DEFAULT_GROUP, "locality topic")


def test_tables_group_label_and_order_by_the_table():
    assert tables.group("odd") == DEFAULT_GROUP and tables.group("odd", {"odd"}) == "kept"
    assert tables.group("efficacy", {"efficacy"}) == "learned" and tables.group("condition") == "other"
    assert tables.label("neighbourhood", short=True) == "neighbours"
    assert tables.headline_parts() == [
        ["efficacy"],
        ["paraphrase"],
        ["neighbourhood", "locality"],
        ["same_subject"],
    ]
    asked = ["bias", "zz", "alias", "same_subject", "efficacy", "neighbourhood", "long"]
    assert tables.order(asked, {"zz"}) == [
        "efficacy", "long", "neighbourhood", "same_subject", "zz", "alias", "bias",
    ]  # fmt: skip


def test_names_of_the_package_are_where_they_were():
    for name in (
        "SLOT", "Case", "Form", "ImageRecord", "ImageRequest", "Observation", "Probe", "Request", "Row",
        "image_problems", "request_problems", "subject_forms",
    ):  # fmt: skip
        assert name in types.__all__ and hasattr(types, name)


def test_covariates_are_part_of_a_probes_identity_only_where_there_are_any():
    probe = types.Probe("bias", "p", ("he",), ("he",))
    assert "covariates" not in types.plain_probe(probe)
    told = dataclasses.replace(probe, covariates=(("factual", 0.5),))
    assert types.plain_probe(told)["covariates"] == (("factual", 0.5),)
    case = types.Case("c", types.Request("Ada is in", "Ada", "Esk"), (probe, told))
    assert [("covariates" in one) for one in types.plain_case(case)["probes"]] == [False, True]
