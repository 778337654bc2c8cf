"""The result of a method: something that can be switched on, applied, taken back, saved and shown."""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from errata.edits import format as file_format
from errata.edits.header import provenance
from errata.errors import EditError, ErrataError
from errata.host import placement
from errata.host.load import Host
from errata.types import ImageRecord, ImageRequest, Request

Outside = Literal["refuse", "discard", "leave"]
"""What to do about a weight that something else has changed while an edit stood on it."""


@dataclass(frozen=True)
class Provenance:
    """All that is needed to say where an edit comes from and to make it again."""

    method: str
    """Registered name of the method."""
    requests: tuple[Request | ImageRecord, ...]
    """What was asked for; of image requests names, number and a content hash, never pixels."""
    config: Mapping[str, Any]
    """The method's settings, resolved: nothing left to a default."""
    host: str
    """Fingerprint of the unedited host."""
    host_name: str = ""
    """How the host was named when the edit was made."""
    seed: int = 0
    """Seed of all randomness in the fit."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of errata, torch, transformers and Python."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What the fit has to say: losses, norms, steps."""
    overrides: tuple[str, ...] = ()
    """Safety checks that were overruled, in words."""
    prompt_format: Mapping[str, Any] = field(default_factory=dict)
    """How prompts were put: template, system prompt, thinking, join; empty in files of earlier versions."""

    def __post_init__(self) -> None:
        kept = tuple(r.record if isinstance(r, ImageRequest) else r for r in self.requests)
        object.__setattr__(self, "requests", kept)


class Edit(ABC):
    """A change to a host, kept apart from it. Subclasses form a small closed family."""

    kind: ClassVar[str]
    provenance: Provenance

    @abstractmethod
    def apply_(self, host: Host, *, foreign: bool = False, beside: bool | None = None) -> None:
        """Put the edit in place. ``foreign`` lets it onto another host than it was made for.

        ``beside``: leave weights as they are and add to what their modules say; None decides by weight.
        """

    @abstractmethod
    def revert_(self, host: Host, *, outside: Outside = "refuse") -> None:
        """Take the edit back; weights are then bit-identical to what they were without it.

        ``outside``: what to do about a weight that something else has changed meanwhile.
        """

    @abstractmethod
    def in_place(self, host: Host) -> bool:
        """Whether the edit, or part of it after an interrupt, is in place on a host."""

    @abstractmethod
    def _tensors(self) -> Mapping[str, Tensor]: ...

    @abstractmethod
    def _header(self) -> Mapping[str, Any]: ...

    @classmethod
    @abstractmethod
    def _restore(
        cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], provenance: Provenance
    ) -> Edit: ...

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Describe the edit as plain data."""

    @contextmanager
    def on(self, host: Host, *, foreign: bool = False, beside: bool | None = None) -> Iterator[Host]:
        """Have the edit in place inside the block only; options as of :meth:`apply_`."""
        mine = True
        try:
            try:
                self.apply_(host, foreign=foreign, beside=beside)
            except ErrataError:
                mine = False  # refused, with nothing changed; what is in place is another's
                raise
            yield host
        finally:
            if mine and self.in_place(host):
                self.revert_(host)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the edit to one ``.safetensors`` file and return its path."""
        header = {"kind": self.kind, "provenance": asdict(self.provenance), **self._header()}
        return file_format.write(path, self._tensors(), header)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Edit:
        """Read an edit from a file. Raises EditError for a foreign, damaged or pickled one."""
        tensors, header = file_format.read(path)
        family = {kind.kind: kind for kind in Edit.__subclasses__()}
        named = header.get("kind")
        kind = family.get(named) if isinstance(named, str) else None
        if kind is None:
            found = repr(named)[:80] if isinstance(named, str) else "nothing that names one"
            raise EditError(f"{path} holds an edit of kind {found}, known: {', '.join(sorted(family))}")
        try:
            made_by = Provenance(**provenance(header.get("provenance")))
            return kind._restore(tensors, header, made_by)
        except Exception as error:  # whatever wrong fields make of what is built of them
            raise EditError(
                f"{path} is damaged: {file_format.reason(error)}, read from its header"
            ) from error

    def check_host(self, host: Host, *, foreign: bool) -> None:
        """Raise EditError when the host is not the one the edit was made for."""
        if self.provenance.host == host.fingerprint:
            return
        found = f"edit made for host {self.provenance.host}, asked to change host {host.fingerprint}"
        if not foreign:
            raise EditError(
                f"{found} ({host.name}); {self._cause(host)}load the right model, or overrule with "
                "foreign=True / --foreign"
            )
        self.provenance = _with_override(self.provenance, found)

    def _cause(self, host: Host) -> str:
        """Name what may alone make two fingerprints of one checkpoint differ; empty where nothing may."""
        made = str(self.provenance.notes.get("dtype", ""))
        now = sorted({str(p.dtype).removeprefix("torch.") for p in host.model.parameters()})
        if "float16" in (made, *now) and made not in now:
            return (
                f"the edit was made in {made or 'another dtype'} and the model is open in {', '.join(now)}: in float16 "
                "numbers too small for it are lost, so that one checkpoint has another fingerprint than in float32 or "
                "bfloat16. If it is the same checkpoint, open it with the dtype the edit was made in, or apply with "
                "foreign=True; else "
            )
        if placement.adapters(host.model):
            return "the model carries PEFT adapters, which count; if that is all, merge or unload them, or "
        return ""


def _with_override(provenance: Provenance, note: str) -> Provenance:
    from dataclasses import replace

    if note in provenance.overrides:
        return provenance
    return replace(provenance, overrides=(*provenance.overrides, note))


def versions() -> dict[str, str]:
    """Versions of what decides an edit's numbers."""
    from importlib.metadata import version

    return {
        "errata": version("errata"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
