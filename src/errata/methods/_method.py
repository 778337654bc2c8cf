"""What every method declares, and what it is handed besides the host and the requests."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from errata import config as settings
from errata.edits.artefact import Artefact
from errata.edits.edit import Edit, Provenance, timestamp, versions
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host import hooks, locking, placed
from errata.host.host import Host
from errata.host.kinds import CAUSAL, kind
from errata.host.layout import DECODER, Site
from errata.linalg.block_moments import mixed
from errata.linalg.moments import Eigen, eigen
from errata.linalg.solve import RIDGE, CostMatrix
from errata.locate.contexts import Context, excerpts, prefixes, sampled_corpus, weigh
from errata.locate.own import OwnCounts, OwnText, own_text
from errata.methods._conflicts import with_conflicts
from errata.methods._costs import factorised, gallery_for, warn_of_few
from errata.progress import OnProgress, ignore
from errata.stats import external
from errata.stats.collect import eigen_of, second_moments
from errata.stats.gallery import picture_moments
from errata.stats.tables import Tables, TableSettings, own_tables
from errata.training.loop import NO_FILES, TrainingFiles
from errata.training.slots import inputs_of
from errata.training.workers import ALONE, Workers
from errata.types import Case, Corpus, Gallery, Request

R = TypeVar("R")
OWN_TEXTS = 10_000
"""Added to the seed of texts that the host writes to be kept, so that none is among those it is measured on."""


class Shape(NamedTuple):
    """What tells one published model from another."""

    family: str
    """Its model type, as in the model's configuration."""
    depth: int
    """Number of blocks."""
    width: int
    """Of the residual stream."""
    inner: int | None = None
    """Width of the feed-forward's hidden layer, where models differ in that alone."""


Published = Mapping[Shape, Mapping[str, Any]]
"""Settings of a method's paper or its authors' code, by the shape of model they were used for."""


Undo = Literal["any", "latest", "none"]
"""Any request of several; the latest, others leaving what was fitted beside them as it is; or none."""


class Baseline(NamedTuple):
    """A method that others are compared with."""

    rank: int
    """Place among the baselines of a board."""
    role: str
    """What its row shows, as "the floor, nothing edited"."""


@dataclass(frozen=True)
class Method:
    """A published editing algorithm and the facts that tables, checks and tests read."""

    name: str
    title: str
    paper: str
    """Authors' title, venue and arXiv id."""
    config: type
    """Frozen dataclass of settings, a string under each field."""
    fit: Callable[[Host, Sequence[Any], Any, Workspace], Edit]
    """Of a host, what it takes, its settings and a workspace."""
    gives: type[Edit]
    batch: bool
    """Whether one fit takes several requests."""
    sequential: bool
    """Whether fits may follow one another on a host that is edited already."""
    undo: Undo = "none"
    """Which requests of a run-time edit can be taken out exactly; those of weights: :mod:`errata.edits.algebra`."""
    train: Callable[[Host, Any, Workspace], Artefact] | None = None
    """Trains what its fits then share, on the workspace's examples; None: nothing is trained beforehand."""
    cumulative: bool = False
    """Whether a fit that goes on from an edit gives the whole change, that edit's included, not only what is new."""
    needs: tuple[str, ...] = ()
    """What it takes besides host and requests: second_moment, contexts, gradients, peft."""
    writes: Literal["site", "linear", "block"] = "site"
    """What it may change: feed-forward and attention outputs, any linear map of a block, or all of a block."""
    takes: Literal["requests", "concept", "contrasts"] = "requests"
    """What a fit is asked for: requests that a prompt be answered, to forget a concept that labelled texts show, or to
    steer to a behaviour that contrast pairs show."""
    hosts: tuple[str, ...] = (CAUSAL,)
    """Kinds of model that it edits, by their names in :mod:`errata.host.kinds`."""
    changes: bool = True
    """Whether its edits change what the model answers at all."""
    blind: str = ""
    """Why requests about pictures are refused, as "it ..."; empty: they are taken where the host reads pictures."""
    forgets: bool = False
    """Whether its edits take a request's old target, or present answer, out of the model; its target is not trained."""
    resumes: bool = False
    """Whether its training writes checkpoints and a log, and goes on from a checkpoint to the same result."""
    parallel: bool = False
    """Whether several processes can share its training."""
    quick: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a short training, which shows that everything works; where empty, there is none."""
    random: bool = True
    """Whether its edits may depend on the seed; boards measure the others once."""
    baseline: Baseline | None = None
    """What it is on boards, for methods that stand on every board to compare with."""
    published: Published = field(default_factory=dict)
    """Settings of its paper or its authors' code, taken where the user leaves them open."""

    def published_for(self, host: Host) -> Mapping[str, Any]:
        """Return the settings published for a model of the host's shape; none: empty."""
        inner = next((site.d_in for site in host.layout.mlp_out if site is not None), None)
        shape = Shape(host.family, len(host.layout.blocks), host.layout.width, inner)
        return self.published.get(shape, self.published.get(shape._replace(inner=None), {}))

    def __post_init__(self) -> None:
        settings.check_names(self.config, self.name)
        all(map(kind, self.hosts))  # raises for one that is not known

    def check_kind(self, host: Host) -> None:
        """Raise ConfigError where the method edits other kinds of model than the host is, with the reason."""
        if host.kind in self.hosts:
            return
        own = kind(host.kind)
        why = f": {own.lacks}" if CAUSAL in self.hosts else ""
        raise ConfigError(
            f"{self.name} edits {' and '.join(kind(name).plural for name in self.hosts)}, and {host.name} is one of "
            f"the {own.plural}{why}"
        )

    def check_after(self, after: Edit | None) -> None:
        """Raise ConfigError where the method cannot continue from an edit."""
        if after is None:
            return
        if not self.sequential:
            raise ConfigError(f"{self.name} does not go on from an earlier edit: fit all requests together")
        if after.provenance.method != self.name:
            raise ConfigError(f"cannot go on with {self.name} from an edit made by {after.provenance.method}")

    def run(
        self,
        host: Host,
        requests: Sequence[Request],
        config: Any,
        work: Workspace,
        after: Edit | None = None,
    ) -> Edit:
        """Fit, alone or going on from an edit of the same method; the result is then one edit for both.

        The model is held alone meanwhile: other threads that run or change it wait. What the caller has set in
        PyTorch does not matter: a fit has gradients also inside ``no_grad`` or ``inference_mode``. Raises
        ConfigError where the two do not belong together.
        """
        with locking.of(host.model).exclusive, hooks.plain_torch(), hooks.evaluating(host.model):
            edit = self._run(host, requests, config, work, after)
        return edit if self.gives is WeightEdit else with_conflicts(edit, len(requests))

    def train_on(self, host: Host, config: Any, work: Workspace) -> Artefact:
        """Train the method's editor on a host; the model is held alone meanwhile, and left as it was.

        Raises ConfigError for a method that trains nothing beforehand.
        """
        if self.train is None:
            raise ConfigError(f"{self.name} trains nothing beforehand; errata methods lists those that do")
        with locking.of(host.model).exclusive, hooks.plain_torch(), hooks.evaluating(host.model):
            self.check_kind(host)
            return self.train(host, config, work)

    def _run(
        self, host: Host, requests: Sequence[Request], config: Any, work: Workspace, after: Edit | None
    ) -> Edit:
        self.check_kind(host)
        host.see(requests)
        self._refuse_routed(host, after)
        self.check_after(after)
        work = replace(work, **gallery_for(host, requests, config, work.remember))
        size = getattr(config, "joint", None) or max(1, len(requests))
        if len(requests) <= size:
            return self._fit_once(host, requests, config, work, after)
        edit, parts = after, list[Mapping[str, Any]]()
        for start in range(0, len(requests), size):
            edit = self._fit_once(host, requests[start : start + size], config, work, edit)
            parts.append(edit.provenance.notes)
        assert edit is not None
        parents = () if after is None else (after.digest,)
        provenance = replace(edit.provenance, notes=_largest(parts), parents=parents)
        return type(edit).restore(edit.parts(), edit.body(), provenance)

    def _fit_once(
        self, host: Host, requests: Sequence[Request], config: Any, work: Workspace, after: Edit | None
    ) -> Edit:
        if after is None:
            return self.fit(host, requests, config, work)
        with after.on(host):
            later = self.fit(host, requests, config, replace(work, after=after))
        return after.then(later, cumulative=self.cumulative)

    def _refuse_routed(self, host: Host, after: Edit | None) -> None:
        """Raise ConfigError where weights would be fitted around edits that act on some prompts only."""
        acting = sorted(placed.on(host.model).digests - {after.digest if after else ""})
        if acting and self.gives is WeightEdit:
            raise ConfigError(
                f"{self.name} changes weights, and edit {acting[0]}, which acts at run time, is in place: what "
                "is fitted now would depend on it; take it off first"
            )


@dataclass
class Workspace:
    """Everything a fit may use besides its arguments; nothing of it is global.

    What is computed here depends on the host, the corpus and the seed alone, so sharing a workspace
    between fits saves time and changes nothing.
    """

    seed: int = 0
    """Seed of prefixes and of all other randomness."""
    corpus: Corpus | None = None
    """Texts for statistics; None lets the host write its own."""
    tokens: int | None = None
    """Token budget that replaces a method's own, if set."""
    folder: Path | None = None
    """Where statistics are kept between runs; None: only in memory."""
    load_examples: Callable[[], Sequence[Case]] = tuple
    """Returns other facts with their probes, for methods that learn from examples; never those that measure."""
    own_editor: Callable[[str], Path | None] = lambda _: None
    """Returns the file of the editor that the host brings along for a method, None where there is none."""
    on_progress: OnProgress = ignore
    """Called with a phase and how far it is."""
    after: Any = None
    """The edit a fit goes on from, in place on the host meanwhile: its records, its state."""
    beneath: Sequence[Edit] = ()
    """Other edits that are in place while a fit runs, and are taken off while statistics and texts are made: these are
    then the unedited host's, which are cached, and a fit on top of many edits costs no more than the first."""
    training: TrainingFiles = NO_FILES
    """What a training leaves on the disk while it goes on."""
    workers: Workers = ALONE
    """The processes that share a training."""
    batch_size: int | None = None
    """Requests run at once; None: as many as suit, fewer when memory runs out."""
    gallery: Gallery | None = None
    """Pictures at whose tokens second moments are taken too; None: none. Set by :meth:`Method.run`."""
    picture_share: float = 0.0
    """Their share in the second moments."""
    _cache: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def examples(self) -> Sequence[Case]:
        """Other facts with their probes, read once."""
        if ("examples",) not in self._cache:
            self._cache[("examples",)] = self.load_examples()
        return self._cache[("examples",)]

    def remember(self, key: tuple[Any, ...], make: Callable[[], R]) -> R:
        """Return what was made under a key before in this workspace, or make it; for what many fits share."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def costs(
        self, host: Host, sites: Sequence[Site], tokens: int, *, ridge: float = RIDGE,
        source: str | None = None,
    ) -> dict[Site, CostMatrix]:  # fmt: skip
        """Return each site's second moment of keys, factorised with a relative ridge; the host's without ``after``.

        ``source``: files to read it from, see :func:`errata.stats.external.second_moment`.
        """
        if source is not None:
            return {site: self._external_cost(source, site, ridge) for site in sites}
        _, _, state = self._moments(host, sites, tokens)
        note = "" if ridge == RIDGE else f", ridge {ridge:g}"
        for site in sites:
            key = ("cost", site, ridge, *state)
            if key not in self._cache:
                moments, name = self._cache[("moments", site, *state)]
                what = f"the statistics of {name} for {site.name}, {moments.count} tokens for {site.d_in} entries,"
                label = name + note
                self._cache[key] = factorised(moments.second, what, ridge=ridge, name=label, overwrite=True)
        return {s: self._cache[("cost", s, ridge, *state)] for s in sites}

    def _external_cost(self, source: str, site: Site, ridge: float) -> CostMatrix:
        matrix, state = self._file(source, site)
        key = ("cost", site, ridge, *state)
        if key not in self._cache:
            what, name = f"{matrix.name} for {site.name}", f"{matrix.name}, ridge {ridge:g}"
            self._cache[key] = factorised(matrix.matrix, what, ridge=ridge, name=name)
        return self._cache[key]

    def _file(
        self, source: str, site: Site, layers: Sequence[int] | None = None
    ) -> tuple[external.ExternalMatrix, tuple[Any, ...]]:
        """Return a second moment, or with ``layers`` a projection, from a file, and what tells it from others.

        Read once while the file is unchanged.
        """
        place = external.file_of(source, site.layer)
        facts = place.stat()
        state = (str(place), facts.st_size, facts.st_mtime_ns, None if layers is None else tuple(layers))
        if ("file", site, *state) not in self._cache:
            self._cache[("file", site, *state)] = (
                external.second_moment(source, site) if layers is None
                else external.projection(source, site, layers)
            )  # fmt: skip
        return self._cache[("file", site, *state)], state

    def projection(self, source: str, site: Site, layers: Sequence[int]) -> tuple[Eigen, str]:
        """Return a projection from a file by its eigenvectors; its layers are in the order of ``layers``."""
        return self._external_spectrum(source, site, layers)

    def _moments(self, host: Host, sites: Sequence[Site], tokens: int) -> tuple[Corpus, int, tuple[Any, ...]]:
        """Compute each site's sums over the corpus where missing; return corpus, budget and what they depend on."""
        corpus, budget, state = self._statistics(host, tokens)
        missing = [s for s in sites if ("moments", s, *state) not in self._cache]
        if missing:
            folder = self.folder_of(host)
            with self.unedited(host):
                moments_by_site = second_moments(
                    host,
                    missing,
                    corpus,
                    tokens=budget,
                    folder=folder,
                    on_tokens=lambda done, total: self.on_progress("statistics", done, total),
                )
                warn_of_few(moments_by_site, corpus)
                if self.gallery is not None:
                    shown = picture_moments(
                        host, missing, self.gallery, tokens=budget, folder=folder,
                        on_tokens=lambda done, total: self.on_progress("statistics of pictures", done, total),
                    )  # fmt: skip
                    moments_by_site = {
                        s: mixed(m, shown[s], self.picture_share) for s, m in moments_by_site.items()
                    }
            name = f"C of {corpus.name}, {budget} tokens{self._mixture}"
            for site, moments in moments_by_site.items():
                self._cache[("moments", site, *state)] = (moments, name)
        return corpus, budget, state

    def spectra(
        self, host: Host, sites: Sequence[Site], tokens: int, *, source: str | None = None
    ) -> dict[Site, tuple[Eigen, str]]:
        """Return each site's second moment of keys by eigenvalues and eigenvectors, and what it is called."""
        if source is not None:
            return {site: self._external_spectrum(source, site) for site in sites}
        corpus, budget, state = self._moments(host, sites, tokens)
        for site in sites:
            key = ("eigen", site, *state)
            if key not in self._cache:
                self._cache[key] = eigen_of(
                    host, site, corpus, tokens=budget, folder=self.folder_of(host),
                    moments=self._cache[("moments", site, *state)][0], mixed_with=self._mixture,
                )  # fmt: skip
        return {s: (self._cache[("eigen", s, *state)], self._cache[("moments", s, *state)][1]) for s in sites}

    def _external_spectrum(
        self, source: str, site: Site, layers: Sequence[int] | None = None
    ) -> tuple[Eigen, str]:
        matrix, state = self._file(source, site, layers)
        if ("eigen", site, *state) not in self._cache:
            self._cache[("eigen", site, *state)] = eigen(matrix.matrix)
        return self._cache[("eigen", site, *state)], matrix.name

    def contexts(
        self, host: Host, groups: Sequence[tuple[int, int]], weighting: str,
        texts: Sequence[str] | None = None,
    ) -> list[Context]:  # fmt: skip
        """Return context prefixes, the bare prompt first; written by the host without ``after``, or ``texts``.

        A host that fills places writes no text: its prefixes are taken from the corpus, none without one.
        """
        if texts is not None:
            return weigh(texts, weighting)
        key = ("contexts", host.fingerprint, *self._others(host), tuple(groups), weighting, self.seed)
        if key not in self._cache:
            with self.unedited(host):
                self._cache[key] = (
                    excerpts(host, self.corpus, groups=groups, weighting=weighting) if host.fills
                    else prefixes(
                        host, seed=self.seed, groups=groups, weighting=weighting, folder=self.folder_of(host)
                    )
                )  # fmt: skip
        return self._cache[key]

    def own_texts(self, host: Host, requests: Sequence[Request], counts: OwnCounts) -> list[OwnText]:
        """Return the host's own statements for each request; none, and no tables, where all counts are zero."""
        if counts == OwnCounts():
            return [OwnText() for _ in requests]
        tables = self.tables(host)
        return [own_text(host, request, tables, counts, seed=self.seed) for request in requests]

    def tables(self, host: Host) -> Tables:
        """Return the host's own tables, see :mod:`errata.stats.tables`; those of the host without ``after``.

        Always mined from what the host writes, whatever the corpus: no text that a user gives can enter.
        """
        key = ("tables", host.fingerprint, *self._others(host), host.prompt_format)
        if key not in self._cache:
            with self.unedited(host):
                self._cache[key] = own_tables(
                    host, TableSettings(), folder=self.folder_of(host),
                    on_progress=self.on_progress,
                )  # fmt: skip
        return self._cache[key]

    def texts(
        self, host: Host, count: int, tokens: int, *, own: bool = False
    ) -> list[tuple[str, tuple[int, ...]]]:
        """Return the beginnings of the corpus's first texts, at most ``tokens`` long, each with its ids.

        ``own``, or without a corpus: texts that the host without ``after`` writes instead.
        """
        corpus = (None if own else self.corpus) or sampled_corpus(
            host, seed=self.seed + OWN_TEXTS, texts=count, length=tokens, folder=self.folder_of(host),
            on_progress=self.on_progress,
        )  # fmt: skip
        key = ("texts", host.fingerprint, *self._others(host), corpus.name, count, tokens)
        if key not in self._cache:
            with self.unedited(host):
                rows = [host.encode(text).ids[:tokens] for text in itertools.islice(corpus.texts(), count)]
            texts = host.tokenizer.batch_decode(rows, skip_special_tokens=True)
            self._cache[key] = [(text, ids) for text, ids in zip(texts, rows, strict=True) if len(ids) > 1]
        return self._cache[key]

    def text_inputs(self, host: Host, module: str, count: int, tokens: int) -> Tensor:
        """Return what a module of the host without ``after`` reads at every token of :meth:`texts` ``[n, d_in]``."""
        name = None if self.corpus is None else self.corpus.name
        state = (host.fingerprint, *self._others(host), name, self.seed)
        key = ("text inputs", *state, module, count, tokens)
        if key not in self._cache:
            rows = [ids for _, ids in self.texts(host, count, tokens)]
            with self.unedited(host), hooks.frozen(host.model):
                self._cache[key] = inputs_of(host, module, rows)
        return self._cache[key]

    def old_answers(self, host: Host, requests: Sequence[Request], tokens: int) -> list[str]:
        """Return each request's old target, or what the host without ``after`` generates where it has none."""
        state = ("old answer", host.fingerprint, *self._others(host), host.prompt_format, tokens)
        missing = [r for r in requests if r.target_old is None and (*state, r) not in self._cache]
        if missing:
            with self.unedited(host):
                answers = host.generate([r.text for r in missing], max_new_tokens=tokens)
            self._cache |= {(*state, r): text.strip(" .\n") for r, text in zip(missing, answers, strict=True)}
        return [self._cache[(*state, r)] if r.target_old is None else r.target_old for r in requests]

    def _statistics(self, host: Host, tokens: int) -> tuple[Corpus, int, tuple[Any, ...]]:
        """Return corpus, budget and what statistics depend on."""
        corpus = self.corpus or sampled_corpus(host, seed=self.seed, folder=self.folder_of(host))
        budget = self.tokens or tokens
        return corpus, budget, (host.fingerprint, *self._others(host), corpus.name, budget, self._mixture)

    @property
    def _mixture(self) -> str:
        """What is in second moments besides the corpus, and with which share; empty: nothing."""
        return (
            ""
            if self.gallery is None
            else f", {self.picture_share:g} of it at pictures of {self.gallery.name}"
        )

    @contextlib.contextmanager
    def unedited(self, host: Host) -> Iterator[None]:
        """Have ``after`` and the edits ``beneath`` off inside the block."""
        aside = [*self.beneath, *([] if self.after is None else [self.after])]
        with contextlib.ExitStack() as stack:
            for edit in reversed(aside):
                stack.enter_context(without(edit, host))
            yield

    def folder_of(self, host: Host) -> Path | None:
        """Return where what is made of the host is kept; None for an edited host, as that is nobody else's."""
        return None if self._others(host) else self.folder

    def _others(self, host: Host) -> list[str]:
        """List edits in place on the host other than ``after`` and those ``beneath``."""
        mine = {edit.digest for edit in (*self.beneath, self.after) if edit is not None}
        return [digest for digest in host.placed if digest not in mine]


@contextlib.contextmanager
def without(after: Edit | None, host: Host) -> Iterator[None]:
    """Have an edit that is in place off inside the block."""
    if after is None:
        yield
        return
    after.revert_(host)
    try:
        yield
    finally:
        after.apply_(host)


def provenance(
    method: str, host: Host, requests: Sequence[Request], config: Any, work: Workspace, **notes: Any
) -> Provenance:
    """Record where an edit comes from."""
    return Provenance(
        method=method,
        requests=tuple(requests),
        config=settings.plain(config),
        host=host.fingerprint,
        host_name=host.name,
        seed=work.seed,
        versions=versions(),
        notes={**notes, "dtype": str(host.dtype).removeprefix("torch.")},
        prompt_format=host.prompt_format.to_dict(),
        parents=(work.after.digest,) if work.after else (),
        created=timestamp(),
    )


Layers = tuple[int, ...] | Literal["wide"] | None
"""Layers to edit: by number, those of :func:`wide_layers`, or None, the method's own."""


def wide_layers(depth: int) -> tuple[int, ...]:
    """Return the layers from a twelfth to five sixths of the depth."""
    return tuple(range(depth // 12, max(depth // 12 + 1, 5 * depth // 6)))


def check_requests(method: str, requests: Sequence[Request]) -> None:
    """Raise ConfigError where there is no request to fit."""
    if not requests:
        raise ConfigError(f"{method} needs at least one request")


def resolve_layers(
    host: Host, layers: Layers, default: Callable[[int], tuple[int, ...]], stack: str = DECODER,
) -> tuple[int, ...]:  # fmt: skip
    """Return the layers to edit: the given ones, else ``default`` of the depth; checked to be editable.

    ``wide`` selects :func:`wide_layers`. A default layer that cannot be edited is replaced by the nearest one that
    can. ``stack``: the stack of an encoder-decoder. Raises ConfigError for repeated layers, HostError for one that
    cannot be edited.
    """
    layout = host.layout.of(stack)
    depth = len(layout.blocks)
    editable = [i for i, site in enumerate(layout.mlp_out) if site is not None]
    if not editable:
        layout.site(0)  # raises, with the reason
    if layers is None or layers == "wide":
        default = default if layers is None else wide_layers
        nearest = (min(editable, key=lambda i: (abs(i - layer), i)) for layer in default(depth))
        return tuple(sorted(set(nearest)))
    numbers = tuple(layer + depth if layer < 0 else layer for layer in layers)
    if not numbers or len(set(numbers)) != len(numbers):
        raise ConfigError(f"layers {list(layers)} must be one or more different layer numbers")
    for layer in numbers:
        layout.site(layer)
    return tuple(sorted(numbers))


def _largest(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the notes of several fits as one: the largest of each number, else the last one's, and their count."""
    largest = {
        name: max(part.get(name, value) for part in parts) if isinstance(value, (int, float)) else value
        for name, value in parts[-1].items()
    }
    return {**largest, "fits": len(parts)}


def notes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Round numbers for the record."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
