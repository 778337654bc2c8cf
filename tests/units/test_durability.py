"""What must never be lost: the original bits, other people's changes, and edits beside weights when saving."""

from __future__ import annotations

import copy
import io
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import errata
from errata.edits import Provenance, WeightEdit
from errata.errors import EditError
from errata.host import locking
from errata.linalg.lowrank import LowRank
from tests.models import fresh

EDITS = Path(errata.__file__).parent / "edits"


def make(host, seed: int = 0, layers=(0, 2), scale: float = 0.1) -> WeightEdit:
    """An edit of several weights, which are stored transposed in GPT-2."""
    generator = torch.Generator().manual_seed(seed)
    sites = [host.layout.site(layer) for layer in layers]
    deltas = {
        site.parameter: LowRank(
            torch.randn(site.d_out, 2, generator=generator) * scale,
            torch.randn(2, site.d_in, generator=generator),
        )
        for site in sites
    }
    crossed = frozenset(site.parameter for site in sites if site.transposed)
    record = Provenance("test", (errata.Request("{} is", "Ada", "Esk"),), {}, host.fingerprint)
    return WeightEdit(dict(deltas), crossed, record)


def bits(host) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in host.model.named_parameters()}


def same(host, start: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, start[name]) for name, weight in host.model.named_parameters())


def clean(host) -> bool:
    bare = not any(module._forward_hooks for module in host.model.modules())
    return bare and not host.placed and "save_pretrained" not in host.model.__dict__


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that the edits room runs, and again ``gap`` lines later."""

    def __init__(self, line: int, gap: int | None = None) -> None:
        self.at = {line, line + gap} if gap else {line}
        self.count, self.raised = 0, 0

    def __enter__(self) -> Interrupt:
        self.old = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.old)

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if Path(frame.f_code.co_filename).parent != EDITS:
            return None
        if event == "line":
            self.count += 1
            if self.count in self.at:
                self.raised += 1
                raise KeyboardInterrupt
        return self.trace


def free(host) -> bool:
    """Whether no thread holds the model's lock."""
    lock = locking.of(host.model)
    return lock._owner is None and not lock._sharing


def interrupted(work: Callable[[], None], line: int, gap: int | None = None) -> bool:
    """Run something with interrupts; whether one was raised, be it swallowed or not."""
    with Interrupt(line, gap) as interrupt:
        try:
            work()
        except KeyboardInterrupt:
            assert interrupt.raised
    return bool(interrupt.raised)


@pytest.fixture(scope="module")
def host():
    """A model on which another edit stands, of one of the weights."""
    host = fresh("gpt2")
    with torch.no_grad():
        for weight in host.model.parameters():
            weight.add_(1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    return host


@pytest.mark.parametrize(("beside", "others", "gap", "step"), [
    pytest.param(False, True, None, 1, marks=pytest.mark.slow),
    pytest.param(True, False, None, 1, marks=pytest.mark.slow),
    (False, True, None, 5), (True, False, None, 5), (False, False, None, 5), (True, True, None, 5),
    (False, True, 3, 7), (True, False, 3, 7),
])  # fmt: skip
def test_an_interrupt_at_any_line_of_placing_leaves_nothing_or_can_be_taken_back(
    host, beside, others, gap, step
):
    edit, other = make(host), make(host, 1, layers=(2, 1))
    if others:
        other.apply_(host, merge=not beside)
    start = bits(host)
    for line in itertools.count(1, step):
        hit = interrupted(lambda: edit.apply_(host, merge=not beside), line, gap)
        if gap is None and hit:
            assert not edit.in_place(host) and same(host, start), f"line {line}"
        if edit.in_place(host):
            edit.revert_(host)
        assert same(host, start) and free(host), f"line {line}"
        assert list(host.placed) == ([other.digest] if others else []), f"line {line}"
        if not hit:
            break
    assert line > 40
    if others:
        other.revert_(host)
    assert clean(host)


@pytest.mark.parametrize(("beside", "others", "step"), [
    (False, True, 1), (True, False, 1), (False, False, 5), (True, True, 5),
])  # fmt: skip
def test_an_interrupt_at_any_line_of_taking_back_loses_no_bit(host, beside, others, step):
    edit, other = make(host), make(host, 1, layers=(2, 1))
    original = bits(host)
    if others:
        other.apply_(host, merge=not beside)
    start = bits(host)
    for line in itertools.count(1, step):
        edit.apply_(host, merge=not beside)
        hit = interrupted(lambda: edit.revert_(host), line)
        for name, stands in host.overlays.items():
            assert torch.equal(stands.base, original[name]), f"line {line}: the original bits are gone"
        if edit.in_place(host):
            edit.revert_(host)
        assert same(host, start) and free(host), f"line {line}"
        if not hit:
            break
    assert line > 10
    if others:
        other.revert_(host)
    assert same(host, original) and clean(host)


def test_an_interrupt_inside_a_block_and_while_leaving_it(host):
    edit, start = make(host), bits(host)

    def block() -> None:
        with edit.on(host):
            assert list(host.placed)

    for line in itertools.count(1, 3):
        hit = interrupted(block, line)
        if edit.in_place(host):
            edit.revert_(host)
        assert same(host, start) and free(host), f"line {line}"
        if not hit:
            break
    assert clean(host)


@pytest.mark.parametrize("kinds", [
    (torch.bfloat16,), (torch.float16,), (torch.float64,), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
])  # fmt: skip
def test_a_model_that_was_cast_meanwhile_gets_its_own_bits_cast_likewise(host, kinds):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    start, edit, other = bits(live), make(live), make(live, 1)
    edit.apply_(live)
    other.apply_(live)
    for kind in kinds:
        live.model.to(kind)
    edit.revert_(live)
    other.revert_(live)
    for name in edit.deltas:
        assert torch.equal(live.model.get_parameter(name), start[name].to(kinds[-1])), name
    assert clean(live)
    with edit.on(live, foreign=True):
        assert list(live.placed) == [edit.digest]


def test_edits_go_on_to_a_model_that_was_cast_while_others_stood_on_it(host):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    start, edit, other = bits(live), make(live), make(live, 1)
    edit.apply_(live)
    live.model.to(torch.bfloat16)
    other.apply_(live)
    live.model.to(torch.float32)
    edit.revert_(live)
    other.revert_(live)
    assert all(torch.equal(live.model.get_parameter(name), start[name]) for name in edit.deltas)


def trained(model: nn.Module, name: str) -> None:
    weight = model.get_parameter(name)
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.requires_grad_(True).square().sum().backward()
    optimizer.step()
    weight.grad = None


def added(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).add_(0.01)


def merged(model: nn.Module, name: str) -> None:
    model.get_parameter(name).data += 0.01  # as adapters are merged; moves no counter of PyTorch's


def one_row(model: nn.Module, name: str) -> None:
    model.get_parameter(name).data[3, 5] = 0.25


def loaded(model: nn.Module, name: str) -> None:
    state = {key: value + 0.01 for key, value in model.state_dict().items() if value.is_floating_point()}
    model.load_state_dict(state, strict=False)


def assigned(model: nn.Module, name: str) -> None:
    weight = model.get_parameter(name)
    weight.data = weight.data + 0.01


def replaced(model: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(model.get_parameter(name).detach() * 1.01))


def cast_and_trained(model: nn.Module, name: str) -> None:
    model.to(torch.bfloat16)
    merged(model, name)


CHANGES = [trained, added, merged, one_row, loaded, assigned, replaced, cast_and_trained]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_something_else_changed_is_refused_and_never_written_over(host, change):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    edit, other = make(live), make(live, 1)
    name = sorted(edit.deltas)[0]
    edit.apply_(live)
    change(live.model, name)
    held = bits(live)
    with pytest.raises(EditError, match="changed by something else") as caught:
        edit.revert_(live)
    assert name in str(caught.value) and "outside='leave'" in str(caught.value)
    with pytest.raises(EditError, match="changed by something else"):
        other.apply_(live, foreign=True)
    assert same(live, held) and edit.in_place(live), "nothing was written, and nothing forgotten"


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("outside", ["discard", "leave"])
def test_two_ways_out_of_a_change_by_something_else(host, change, outside):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    start, edit = bits(live), make(live)
    first, second = sorted(edit.deltas)
    edit.apply_(live)
    change(live.model, first)
    held, kind = bits(live), live.dtype
    edit.revert_(live, outside=outside)
    weight = live.model.get_parameter(first)
    assert torch.equal(weight, start[first].to(kind) if outside == "discard" else held[first])
    untouched = change is not loaded
    if untouched or outside == "discard":
        assert torch.equal(live.model.get_parameter(second), start[second].to(kind))
    assert list(live.placed) == [] and not live.placed


def test_a_weight_that_already_is_what_taking_back_would_write_is_no_obstacle(host):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    start, edit = bits(live), make(live)
    state = copy.deepcopy(live.model.state_dict())
    edit.apply_(live)
    live.model.load_state_dict(state)  # the unedited checkpoint once more
    edit.revert_(live)
    assert same(live, start) and clean(live)


def test_a_weight_that_is_gone_or_of_another_shape_keeps_its_original_bits(host):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    start, edit = bits(live), make(live)
    name = sorted(edit.deltas)[0]
    path = name.rpartition(".")[0]
    edit.apply_(live)
    module = live.model.get_submodule(path)
    weight = module.weight
    del module.weight
    with pytest.raises(EditError, match="no weight"):
        edit.revert_(live)
    module.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(EditError, match="cannot be written back"):
        edit.revert_(live, outside="discard")
    module.weight = nn.Parameter(weight.detach().to("meta"))
    with pytest.raises(EditError, match="meta device"):
        edit.revert_(live)
    module.weight = weight
    edit.revert_(live)
    assert same(live, start) and clean(live)


def test_changes_of_other_weights_are_nobodys_business(host):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    edit, start = make(live), bits(live)
    elsewhere = live.layout.site(1).parameter
    with edit.on(live):
        merged(live.model, elsewhere)
    assert torch.equal(live.model.get_parameter(elsewhere), start[elsewhere] + 0.01)
    assert all(torch.equal(live.model.get_parameter(name), start[name]) for name in edit.deltas)


@pytest.mark.parametrize("change", CHANGES[:-1], ids=lambda change: change.__name__)
def test_a_fingerprint_is_never_stale(host, change):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    name, first = live.layout.site(1).parameter, live.fingerprint
    edit = make(live)
    with edit.on(live):
        assert live.fingerprint == first
    change(live.model, name)
    again = errata.Host(copy.deepcopy(live.model), host.tokenizer, name="again").fingerprint
    assert live.fingerprint == again
    assert again != first or change is trained, "a step may be lost in bfloat16, in which hosts are compared"
    if again != first:
        with pytest.raises(EditError, match="made for host"):
            edit.apply_(live)


def test_a_fit_looks_at_the_weights_once(host, monkeypatch):
    from errata.host import identity

    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    looks: list[int] = []
    look = identity.contents
    monkeypatch.setattr(identity, "contents", lambda *what: (looks.append(1), look(*what))[1])
    requests = [errata.Request("{} was born in", "Ada Brenner", "Tallow")]
    errata.edit(live, requests, method="memit", steps=2, tokens=300, layers=[0, 1])
    assert len(looks) == 1


# --- copies and files ---------------------------------------------------------------------------


def test_models_are_copied_pickled_and_saved_as_ever(host, tmp_path):
    live = errata.Host(copy.deepcopy(host.model), host.tokenizer, name="live")
    start, edit = bits(live), make(live)
    for beside in (False, True):
        edit.apply_(live, merge=not beside)
        other = errata.Host(copy.deepcopy(live.model), host.tokenizer, name="copy")
        assert locking.of(other.model) is not locking.of(live.model)
        edit.revert_(other)
        assert same(other, start) and clean(other)
        stream = io.BytesIO()
        torch.save(live.model, stream)
        stream.seek(0)
        opened = errata.Host(torch.load(stream, weights_only=False), host.tokenizer, name="opened")
        edit.revert_(opened)
        assert same(opened, start) and clean(opened)
        edit.revert_(live)
    stream = io.BytesIO()
    torch.save(live.model, stream)
    assert b"errata.host" not in stream.getvalue() and b"errata.edits" not in stream.getvalue(), (
        "an unedited model needs no errata to be opened again"
    )
    live.model.save_pretrained(tmp_path)
    assert same(errata.load(str(tmp_path), tokenizer=host.tokenizer), start)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_saved_with_edits_beside_its_weights_has_them_merged_and_says_so(tmp_path, family, dtype):
    live = fresh(family)
    live.model.to(dtype)
    edit, other = make(live), make(live, 1)
    edit.apply_(live)
    merged = bits(live)
    edit.revert_(live)
    edit.apply_(live, merge=False)
    held = bits(live)
    with pytest.warns(UserWarning, match="unmerged edit of .* in the saved model it is merged") as caught:
        live.model.save_pretrained(tmp_path / "one")
    assert {w.filename for w in caught} == {__file__} and len(caught) == 1
    assert same(live, held), "the live model is as it was"
    assert same(errata.load(str(tmp_path / "one"), tokenizer=live.tokenizer), merged)
    with pytest.warns(UserWarning, match="not in this state dict"):
        state = live.model.state_dict()
    assert all(torch.equal(state[name], held[name]) for name in edit.deltas)
    with other.on(live, merge=False):
        pass
    with pytest.warns(UserWarning, match="merged"):
        live.model.save_pretrained(tmp_path / "two")
    edit.revert_(live)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live.model.save_pretrained(tmp_path / "three")
        live.model.state_dict()
    assert same(errata.load(str(tmp_path / "three"), tokenizer=live.tokenizer), held) and clean(live)
