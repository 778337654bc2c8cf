"""The result of a method: a frozen artefact that is placed on a host and removed, saved, loaded and described."""

from __future__ import annotations

import json
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property, lru_cache
from inspect import isabstract
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from errata.checksum import checksum
from errata.edits import format as file_format
from errata.edits.header import provenance_fields
from errata.errors import EditError, ErrataError
from errata.host import placement
from errata.host.base import ModelHost
from errata.types import Concept, ConceptRecord, Contrasts, ImageRecord, ImageRequest, Request
from errata.types.picture import plain_pictures

TRAINED = "artefact"
"""What the header of a trained editor's file names as its kind, see :class:`errata.edits.artefact.Artefact`."""
Outside = Literal["refuse", "discard", "leave"]
"""What to do about a weight that something else has changed while an edit was merged into it."""


@dataclass(frozen=True)
class Provenance:
    """Where an edit comes from: all that is needed to fit it again."""

    method: str
    """Registered name of the method."""
    requests: tuple[Request | ImageRecord | ConceptRecord, ...]
    """The requests; of images and concepts names, numbers and a content hash, never pixels or texts."""
    config: Mapping[str, Any]
    """The method's settings with all defaults resolved."""
    host: str
    """Fingerprint of the unedited host."""
    host_name: str = ""
    """Name of the host when the edit was fitted."""
    seed: int = 0
    """Seed of all randomness in the fit."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Versions of errata, torch, transformers and Python."""
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Results of the fit: losses, norms, steps."""
    prompt_format: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How prompts were formatted: template, system prompt, thinking, join; empty in files of earlier versions."""
    parents: tuple[str, ...] = ()
    """Digests of the edits this one was computed from: continued, refitted or retracted from."""
    created: str = ""
    """When it was fitted, UTC, ISO 8601 to the second; empty in files of earlier versions. Not part of the digest:
    the same fit gives the same edit at any time."""

    def __post_init__(self) -> None:
        kept = (ImageRequest, Concept, Contrasts)
        recorded = tuple(r.record if isinstance(r, kept) else r for r in self.requests)
        object.__setattr__(self, "requests", recorded)

    def identity(self) -> dict[str, Any]:
        """Return what an edit's digest covers of its provenance, as plain data."""
        return {name: value for name, value in self.to_dict().items() if name != "created"}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain data, as files hold them; of a picture its name and hash, where there is one."""
        plain = asdict(self)
        for record, request in zip(plain["requests"], self.requests, strict=True):
            record.pop("image", None)
            record.pop("more_images", None)
            if isinstance(request, Request) and request.image is not None:
                record["image"] = plain_pictures(request.image, request.more_images)
        return plain


def timestamp() -> str:
    """Return the current time in the format of :attr:`Provenance.created`."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Placement:
    """The receipt for an edit in place on a host."""

    digest: str
    """Digest of the edit."""
    host: str
    """Fingerprint of the host without edits."""
    lost: Mapping[str, float] = field(default_factory=dict[str, float])
    """By merged parameter, the share of the change lost to rounding: ||(W' - W) - delta|| / ||delta||."""
    unmerged: tuple[str, ...] = ()
    """Parameters whose change is added to their module's output instead, without loss of precision."""
    overrides: tuple[str, ...] = ()
    """Safety checks that were overruled, in words."""
    rows: str | None = None
    """The edit set on whose rows it acts; None: all rows."""


class Edit(ABC):
    """A change to a host, stored apart from it; frozen. Subclasses form a small closed family."""

    kind: ClassVar[str]
    provenance: Provenance

    @cached_property
    def digest(self) -> str:
        """Identity of the edit, 16 hex digits: kind, provenance without its time, body and tensors."""
        plain = {"kind": self.kind, "provenance": self.provenance.identity(), "body": self.body()}
        return checksum(json.loads(json.dumps(plain)), self.parts())[:16]

    @abstractmethod
    def parts(self) -> Mapping[str, Tensor]:
        """Return all tensors ``[...]`` of the edit, by the names they have in its file."""

    @abstractmethod
    def body(self) -> Mapping[str, Any]:
        """Return everything else except the provenance, as plain data for the file's header."""

    @classmethod
    @abstractmethod
    def restore(cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance) -> Edit:
        """Build an edit from its :meth:`parts` ``[...]`` and :meth:`body`. Raises ValueError or KeyError."""

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parts().values())

    @abstractmethod
    def place(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None, rows: str | None = None
    ) -> Placement:
        """Put the edit in place and return the receipt; nothing about the edit changes.

        ``foreign`` allows another host than the one it was computed for. ``merge``: whether to write into weights,
        which rounds to their precision, or to add to their modules' outputs; None decides by weight. ``rows``: name of
        an edit set; the edit then acts only on rows of a batch that belong to it, as in
        ``host.generate(prompts, sets=[...])``. Raises EditError, with nothing changed, if the edit cannot be put in
        place.
        """

    @abstractmethod
    def revert_(self, host: ModelHost, *, outside: Outside = "refuse") -> None:
        """Remove the edit; weights are then bit-identical to what they were without it.

        ``outside``: what to do about a weight that something else has changed meanwhile.
        """

    @abstractmethod
    def in_place(self, host: ModelHost) -> bool:
        """Whether the edit, or part of it after an interrupt, is in place on a host."""

    @abstractmethod
    def then(self, later: Any, *, cumulative: bool = False) -> Edit:
        """Return one edit for this one and a later fit of the same method that continued it.

        ``cumulative``: whether the later one includes this one's change. Raises EditError if the two cannot be
        combined.
        """

    def summary(self) -> dict[str, Any]:
        """Describe the edit as plain data: what was requested, by which method, for which host."""
        provenance = self.provenance
        return {
            "kind": self.kind,
            "digest": self.digest,
            "method": provenance.method,
            "host": provenance.host,
            "host_name": provenance.host_name,
            "seed": provenance.seed,
            "config": dict(provenance.config),
            "prompt_format": dict(provenance.prompt_format),
            "requests": [request.to_dict() for request in provenance.requests],
            "versions": dict(provenance.versions),
            "notes": dict(provenance.notes),
            "parents": list(provenance.parents),
            "created": provenance.created,
            "bytes": self.size,
        }

    def apply_(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None, rows: str | None = None,
        beside: bool | None = None,
    ) -> Placement:  # fmt: skip
        """Put the edit in place until :meth:`revert_`; options as of :meth:`place`.

        ``beside``: name of earlier versions for the opposite of ``merge``.
        """
        return self.place(host, foreign=foreign, merge=merge if beside is None else not beside, rows=rows)

    @contextmanager
    def on(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None, rows: str | None = None,
        beside: bool | None = None,
    ) -> Generator[Placement, None, None]:  # fmt: skip
        """Put the edit in place inside the block and revert it after; options as of :meth:`apply_`."""
        placed_here = True
        try:
            try:
                receipt = self.apply_(host, foreign=foreign, merge=merge, rows=rows, beside=beside)
            except ErrataError:
                placed_here = False  # refused, with nothing changed; what is in place is another's
                raise
            yield receipt
        finally:
            if placed_here and self.in_place(host):
                self.revert_(host)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the edit to one ``.safetensors`` file and return its path."""
        header = {
            "kind": self.kind,
            "digest": self.digest,
            "provenance": self.provenance.to_dict(),
            **self.body(),
        }
        return file_format.write(path, self.parts(), header)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Edit:
        """Read an edit from a file. Raises EditError for a foreign, damaged or pickled one."""
        tensors, header = file_format.read(path)
        family = {kind.kind: kind for kind in _concrete(Edit)}
        name = header.get("kind")
        if name == TRAINED:
            raise EditError(f"{path} is a trained editor, no edit: edit with it by --set editor={path}")
        kind = family.get(name) if isinstance(name, str) else None
        if kind is None:
            label = repr(name)[:80] if isinstance(name, str) else f"a {type(name).__name__}"
            raise EditError(
                f"{path} has an edit of kind {label}, expected one of {', '.join(sorted(family))}"
            )
        try:
            edit = kind.restore(tensors, header, Provenance(**provenance_fields(header.get("provenance"))))
            file_format.check_digest(header, edit.digest, tensors)
        except Exception as error:  # wrong fields may raise anything
            raise EditError(
                f"{path} is damaged: {file_format.reason(error)}, read from its header"
            ) from error
        return edit

    def joint_provenance(self, later: Edit) -> Provenance:
        """Return the later edit's provenance with the requests of both and this edit as its parent."""
        requests = (*self.provenance.requests, *later.provenance.requests)
        return replace(later.provenance, requests=requests, parents=(self.digest,))

    def require_in_place(self, host: ModelHost) -> None:
        """Raise EditError unless the edit is in place on a host."""
        if not self.in_place(host):
            raise EditError(f"edit {self.digest} is not active on this host; nothing to revert")

    def overridden_checks(self, host: ModelHost, *, foreign: bool) -> tuple[str, ...]:
        """Return the checks that ``foreign`` overrules. Raises EditError when the host is another one without it."""
        if self.provenance.host == host.fingerprint:
            return ()
        mismatch = f"edit made for host {self.provenance.host}, asked to change host {host.fingerprint}"
        if not foreign:
            raise EditError(
                f"{mismatch} ({host.name}); {self._cause(host)}load the right model, or overrule with "
                "foreign=True / --foreign"
            )
        return (mismatch,)

    def _cause(self, host: ModelHost) -> str:
        """Return a possible reason why the fingerprints of one checkpoint differ; empty if there is none."""
        fitted_dtype = str(self.provenance.notes.get("dtype", ""))
        now = sorted({str(p.dtype).removeprefix("torch.") for p in host.model.parameters()})
        if "float16" in (fitted_dtype, *now) and fitted_dtype not in now:
            return (
                f"the edit was made in {fitted_dtype or 'another dtype'} and the model is open in {', '.join(now)}: "
                "float16 loses very small numbers, so that one checkpoint has another fingerprint than in float32 or "
                "bfloat16. If it is the same checkpoint, open it with the dtype the edit was made in, or apply with "
                "foreign=True; else "
            )
        if placement.adapters(host.model):
            return "the model has PEFT adapters, which change its fingerprint; merge or unload them, or "
        return ""


def _concrete(kind: type[Edit]) -> Iterator[type[Edit]]:
    """Yield the kinds of edit that can be built, at any depth below one."""
    for below in kind.__subclasses__():
        if not isabstract(below):
            yield below
        yield from _concrete(below)


def versions() -> dict[str, str]:
    """Return the versions of the packages that an edit's numbers depend on."""
    packages = {name: _version(name) for name in ("errata", "torch", "transformers")}
    return {**packages, "python": platform.python_version()}


@lru_cache(maxsize=8)
def _version(package: str) -> str:
    """Return the version of an installed package; cached, as reading its metadata is slow."""
    from importlib.metadata import version

    return version(package)
