"""Observations of the unedited host: computed once, cached in the run folder, shared by all cells and processes.

The cache key of a chunk of cases is the hash of host, options and probes. A chunk has one JSON file with texts and
log-probabilities of answers, and one safetensors file with next-token distributions, from which each is read only when
it is needed, so that memory stays bounded for any vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from errata.bench import results
from errata.bench.runner import CHUNK
from errata.errors import DataError
from errata.evaluation.observe import observe, unique
from errata.host.host import Host
from errata.progress import OnCount, ignore
from errata.types import AskOptions, Case, Observation, Probe, plain_probe

FORMAT = 2
SPREAD = "next_logprobs"
"""The field of an observation that is a tensor."""


@dataclass(frozen=True)
class _Chunk:
    """Observations of one chunk of cases, as read from its files."""

    observations: Mapping[Probe, Observation]
    """Observations without next-token distributions."""
    places: Mapping[Probe, str]
    """By probe, the name of its distribution in the file ``tensors``."""
    tensors: Path
    seconds: float
    """Time for observing, in this run or an earlier one."""


class Unedited:
    """Observations of some cases by a host without edits."""

    def __init__(
        self, folder: Path, host: Host, cases: Sequence[Case], ask: AskOptions, *, chunk: int | None = None,
        on_progress: OnCount = ignore,
    ) -> None:  # fmt: skip
        """``chunk``: number of cases observed together, default :data:`CHUNK`. Nothing is observed yet."""
        self.folder, self.host, self.cases, self.ask = folder, host, cases, ask
        self.on_progress = on_progress
        self._chunk_size = chunk or CHUNK
        self._chunk_of = {case.id: place // self._chunk_size for place, case in enumerate(cases)}
        if len(self._chunk_of) != len(cases) > self._chunk_size:
            raise DataError(
                f"{len(cases)} cases have only {len(self._chunk_of)} different names; give each its own name"
            )
        self._loaded_chunk: tuple[int, _Chunk] | None = None

    def of(self, case: Case) -> list[Observation]:
        """Return the observations for a case's probes, from the cache or by observing the case's chunk.

        The case must have the same probes as the case of that name given to the constructor.
        """
        chunk = self._at(self._chunk_of[case.id])
        return [_with_spread(chunk, probe) for probe in case.probes]

    def seconds(self) -> float:
        """Return the seconds for observing all cases, in this run or an earlier one."""
        return sum(self._at(i).seconds for i in range(-(-len(self.cases) // self._chunk_size)))

    def _at(self, place: int) -> _Chunk:
        if self._loaded_chunk is None or self._loaded_chunk[0] != place:
            cases = self.cases[place * self._chunk_size : (place + 1) * self._chunk_size]
            probes = unique(probe for case in cases for probe in case.probes)
            self._loaded_chunk = (place, self._chunk(probes))
        return self._loaded_chunk[1]

    def _chunk(self, probes: Sequence[Probe]) -> _Chunk:
        facts = {
            "format": FORMAT,
            "host": self.host.fingerprint,
            "dtype": str(self.host.dtype),
            "device": self.host.device.type,
            "options": self.ask.to_dict(),
        }
        questions = json.dumps([plain_probe(probe) for probe in probes], sort_keys=True)
        key = hashlib.sha256((json.dumps(facts, sort_keys=True) + questions).encode()).hexdigest()[:24]
        texts, tensors = (self.folder / f"{key}.{kind}" for kind in ("json", "safetensors"))
        chunk = _read(texts, tensors, probes)
        if chunk is None:
            with _locked(self.folder / f"{key}.lock"):
                chunk = _read(texts, tensors, probes)  # another process may have written it meanwhile
                if chunk is None:
                    self._observe(facts, probes, texts, tensors)
        chunk = chunk or _read(texts, tensors, probes)
        if chunk is None:
            raise DataError(f"{texts} does not contain what was just written to it; check the disk")
        return chunk

    def _observe(self, facts: Mapping[str, Any], probes: Sequence[Probe], texts: Path, tensors: Path) -> None:
        from safetensors.torch import save_file

        at = time.perf_counter()
        observations = observe(self.host, probes, self.ask, on_progress=self.on_progress)
        seconds = time.perf_counter() - at
        spreads = {
            str(i): one.next_logprobs for i, one in enumerate(observations) if one.next_logprobs is not None
        }
        whole = {name: spread.cpu().clone() for name, spread in spreads.items()}  # rows of one tensor
        part = _part(tensors)
        try:
            save_file(whole, part)
            part.replace(tensors)
        finally:
            part.unlink(missing_ok=True)
        document = {
            **facts,
            "seconds": seconds,
            "spreads": sorted(spreads, key=int),
            "observations": [_plain(one) for one in observations],
        }
        document = json.loads(json.dumps(document))  # NaN and Infinity by Python's names
        document[results.FILES] = results.hashes(self.folder, [tensors.name])
        results.write_file(texts, json.dumps({**document, results.SEAL: results.seal_of(document)}))


def _plain(observation: Observation) -> dict[str, Any]:
    return asdict(replace(observation, next_logprobs=None))


def _read(texts: Path, tensors: Path, probes: Sequence[Probe]) -> _Chunk | None:
    """Read a chunk; None if it is missing or damaged, so that it is computed again."""
    if not texts.is_file():
        return None
    try:
        document = results.read_document(texts, sealed=True)
    except DataError:
        return None
    if results.hashes(tensors.parent, [tensors.name]) != document[results.FILES]:
        return None
    observations = [_observation(record) for record in document["observations"]]
    if len(observations) != len(probes):
        raise DataError(f"{texts} holds {len(observations)} observations, expected {len(probes)}; remove it")
    places = {probes[int(name)]: name for name in document["spreads"]}
    return _Chunk(dict(zip(probes, observations, strict=True)), places, tensors, document["seconds"])


def _observation(record: Mapping[str, Any]) -> Observation:
    names = {field.name for field in fields(Observation)}
    return Observation(**{name: _tuples(value) for name, value in record.items() if name in names})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _with_spread(chunk: _Chunk, probe: Probe) -> Observation:
    """Add a probe's next-token distribution to its observation, read from the file now."""
    observation, name = chunk.observations[probe], chunk.places.get(probe)
    return observation if name is None else replace(observation, next_logprobs=_tensor(chunk.tensors, name))


def _tensor(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        # copied: sums may differ in the last bit between differently aligned memory
        return file.get_tensor(name).clone()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock inside the block; it is released when the process ends in any way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield
