"""errata stats: compute the statistics that closed-form methods need, and their quality."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common
from errata.cli._verb import Verb
from errata.progress import OnProgress

if TYPE_CHECKING:
    from errata.host.host import Host
    from errata.host.layout import Site
    from errata.linalg.block_moments import AnyMoments
    from errata.stats.tables import Tables
    from errata.types import Corpus, Gallery

FILES = (".txt", ".jsonl", ".md", ".text")


CorpusName = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DATASET",
        help="Text file, .jsonl with a field text, or a public dataset, owner/name[:config]; "
        "default: text sampled from the model.",
    ),
]
Pictures = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|FILE",
        help="Compute those at pictures' tokens too: a folder of pictures, or .jsonl with image and text; default: "
        "the model's own, as lab-vl has.",
    ),
]


def command(
    model: common.Model,
    corpus: CorpusName = None,
    pictures: Pictures = None,
    tokens: Annotated[int, typer.Option(min=1, help="Token budget; of pictures' tokens as many again.")] = 1_000_000,
    layers: Annotated[str | None, typer.Option(help="As in 0,2,5-8; default: all editable.")] = None,
    eigen: Annotated[
        bool, typer.Option("--eigen", help="Also compute the eigendecompositions that some methods need.")
    ] = False,
    tables: Annotated[
        bool,
        typer.Option(
            "--tables", help="Instead: mine templates and names from free text, and let the model complete them."
        ),
    ] = False,
    budget: Annotated[
        int, typer.Option(min=1, help="With --tables: maximum number of generated tokens.")
    ] = 150_000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimated cost; compute nothing.")] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:  # fmt: skip
    """Compute the second moments of keys over a corpus, all layers in one pass; cached for later edits.

    An interrupted pass is resumed. Methods use these statistics if they need the same number of tokens of the same
    corpus: --set tokens=N; and those at the same pictures: --set pictures=FOLDER. The cache folder is that of the
    environment variable ERRATA_CACHE, by default errata in the user's cache. With --tables: find names and templates in
    the model's own text and record its answer to each; used by the settings paraphrases, consequences, inverses,
    anchors and mates of methods that have them.
    """
    from errata.errors import ConfigError
    from errata.methods._method import resolve_layers

    host = _opened(model, device, dtype)
    if tables:
        if pictures is not None:
            raise ConfigError("--tables are mined from texts; leave --pictures out")
        _tables(host, corpus, budget, seed, dry_run, json)
        return
    layer_numbers = resolve_layers(host, _layers(layers), lambda depth: tuple(range(depth)))
    sites = [host.layout.site(layer) for layer in layer_numbers]
    texts = _corpus(host, corpus, seed)
    document = _facts(host, texts, tokens)
    gallery = _gallery(host, pictures)
    if gallery is not None:
        document["pictures"] = {"gallery": gallery.name}
    if dry_run:
        _show_cost({**document, "dry_run": True, **_cost(host, sites, texts, tokens)}, json)
        return
    with common.progress(not json) as tick:
        document["layers"] = _measure(host, sites, texts, tokens, eigen, tick)
        if gallery is not None:
            document["pictures"] |= {"layers": _measure_pictures(host, sites, gallery, tokens, tick)}
    document["tokens"] = document["layers"][0]["tokens"]
    if json:
        common.emit(document)
    else:
        _show(document)


def _opened(model: str, device: str, dtype: str) -> Host:
    """Open a model of texts. Raises ConfigError or HostError for one that statistics of texts are not computed of."""
    from errata.errors import ConfigError
    from errata.host.kinds import check_asked

    host = common.open_host(model, device, dtype)
    check_asked(host.name, host.kind, "a collection of statistics")
    if host.tokenizer is None:
        raise ConfigError(f"statistics are computed over texts, and {host.name} reads none")
    return host


def _tables(
    host: Host, corpus: str | None, budget: int, seed: int, dry_run: bool, json: bool
) -> None:  # fmt: skip
    """Compute the host's own tables and print them, or with ``dry_run`` print their cost."""
    from errata.stats.cache import cache_dir, path
    from errata.stats.tables import TableSettings, facts, own_tables

    settings = TableSettings(budget=budget, seed=seed)
    texts = None if corpus is None else _corpus(host, corpus, seed)
    place = path(cache_dir(), facts(host, settings, texts), "tables")
    document: dict[str, Any] = {"model": host.name, "path": str(place), "kept_already": place.exists()}
    if dry_run:
        cost = 0 if place.exists() else budget
        common.emit({**document, "dry_run": True, "tokens": cost}) if json else print(
            f"tables of {host.name}: {cost:,} generated tokens at most, in {place}\n"
            "dry run: nothing was computed or written"
        )
        return
    with common.progress(not json) as tick:
        host_tables = own_tables(host, settings, corpus=texts, folder=cache_dir(), on_progress=tick)
    if json:
        common.emit({**document, **host_tables.to_dict(), "report": host_tables.report()})
        return
    _show_tables(host_tables, str(place))


def _show_tables(host_tables: Tables, place: str) -> None:
    for row in host_tables.report():
        rows = [
            (
                one["template"],
                one["paraphrases"],
                one["example"],
                ", ".join(one["follows"]) or "-",
                ", ".join(one["inverses"]) or "-",
            )
            for one in row["relations"]
        ]
        common.table(
            f"{row['names']} names such as {', '.join(row['examples'])}: {row['templates']} templates",
            ("template", "paraphrases", "example", "consequences", "inverses"), rows, right=(1,),
        )  # fmt: skip
    if not host_tables.types:
        print("no template repeats in this text: methods sample text about each subject instead")
    print(
        f"from {host_tables.texts:,} texts {host_tables.source}; {host_tables.prompts:,} prompts answered, "
        f"at most {host_tables.generated:,} tokens generated; stored in {place}"
    )


def _layers(text: str | None) -> tuple[int, ...] | None:
    """Read numbers and ranges, as in ``0,2,5-8``."""
    from errata.errors import ConfigError

    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ConfigError(f"--layers {text!r}: expected numbers and ranges, as in 0,2,5-8")
        first, last = int(match[1]), int(match[2] or match[1])
        numbers += range(first, last + 1)
    return tuple(numbers)


def _corpus(host: Host, name: str | None, seed: int) -> Corpus:
    """Open the corpus: a file, else a public dataset; without a name, the one that edits use by default."""
    from errata.locate.contexts import sampled_corpus
    from errata.stats.collect import public_corpus
    from errata.stats.corpora import file_corpus

    if name is None:
        return host.resources.corpus or sampled_corpus(host, seed=seed)
    path = Path(name).expanduser()
    if not path.exists() and path.suffix.lower() not in FILES:
        return public_corpus(name)
    return file_corpus(path)


def _gallery(host: Host, source: str | None) -> Gallery | None:
    """Open the pictures of a folder or file, else the model's own, if it has any."""
    from errata.stats.gallery import file_gallery

    return host.resources.gallery if source is None else file_gallery(Path(source))


def _measure_pictures(
    host: Host, sites: list[Site], gallery: Gallery, tokens: int, tick: OnProgress
) -> list[dict[str, Any]]:
    """Compute the second moments at pictures' tokens and describe each layer's."""
    from errata.stats import cache
    from errata.stats.gallery import facts, picture_moments

    folder = cache.cache_dir()
    places = [cache.path(folder, facts(host, site, gallery, tokens=tokens)) for site in sites]
    before = [_modified_at(place) for place in places]
    start = time.perf_counter()
    moments = picture_moments(
        host, sites, gallery, tokens=tokens, folder=folder,
        on_tokens=lambda completed, total: tick("pictures' tokens", completed, total),
    )  # fmt: skip
    seconds = round(time.perf_counter() - start, 3)
    rows = []
    for i, (site, place, earlier) in enumerate(zip(sites, places, before, strict=True)):
        tick("condition", i, len(sites))
        same = earlier is not None and _modified_at(place) == earlier
        rows.append(_row(site, moments[site], None if same else seconds, place))
    tick("condition", len(sites), len(sites))
    return rows


def _facts(host: Host, corpus: Corpus, tokens: int) -> dict[str, Any]:
    from errata.stats.cache import cache_dir
    from errata.stats.collect import row_tokens

    return {
        "model": host.name,
        "fingerprint": host.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "corpus": corpus.name,
        "tokens_asked": tokens,
        "row_tokens": row_tokens(host),
        "folder": str(cache_dir()),
    }


def _cost(host: Host, sites: list[Site], corpus: Corpus, tokens: int) -> dict[str, Any]:
    from errata.stats.collect import cost

    missing = [site for site in sites if not _place(host, site, corpus, tokens).exists()]
    estimate = cost(host, missing, tokens=tokens)
    return {
        "layers": [site.layer for site in sites],
        "kept_already": [site.layer for site in sites if site not in missing],
        "tokens": estimate.tokens if missing else 0,
        "flop": estimate.flop,
        "disk_bytes": estimate.disk_bytes,
        "eigen_bytes": estimate.eigen_bytes,
    }


def _place(host: Host, site: Site, corpus: Corpus, tokens: int) -> Path:
    from errata.stats import cache
    from errata.stats.collect import facts

    return cache.path(cache.cache_dir(), facts(host, site, corpus, tokens=tokens))


def _measure(
    host: Host, sites: list[Site], corpus: Corpus, tokens: int, decompose: bool, tick: OnProgress
) -> list[dict[str, Any]]:
    from errata.stats.cache import cache_dir
    from errata.stats.collect import eigen_of, second_moments

    places = {site: _place(host, site, corpus, tokens) for site in sites}
    before = {site: _modified_at(place) for site, place in places.items()}
    start = time.perf_counter()
    moments_by_site = second_moments(
        host, sites, corpus, tokens=tokens, folder=cache_dir(),
        on_tokens=lambda completed, total: tick("tokens", completed, total),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    # a damaged file existed before but was computed again
    cached_sites = {
        site
        for site, place in places.items()
        if before[site] is not None and _modified_at(place) == before[site]
    }
    rows = []
    for i, (site, moments) in enumerate(moments_by_site.items()):
        tick("condition", i, len(moments_by_site))
        if decompose:
            eigen_of(host, site, corpus, tokens=tokens, folder=cache_dir(), moments=moments)
        rows.append(_row(site, moments, None if site in cached_sites else round(seconds, 3), places[site]))
    tick("condition", len(moments_by_site), len(moments_by_site))
    return rows


def _row(site: Site, moments: AnyMoments, seconds: float | None, place: Path) -> dict[str, Any]:
    """Describe a layer's moments; ``seconds``: of the pass they are from, None where they were read."""
    from errata.linalg.moments import condition

    return {
        **_quality(moments, condition(moments.second)),
        "layer": site.layer,
        "width": site.d_in,
        "seconds": seconds,
        "kept_already": seconds is None,
        "path": str(place),
    }


def _modified_at(place: Path) -> int | None:
    """Return when a file was written, in nanoseconds; None if there is none."""
    return place.stat().st_mtime_ns if place.exists() else None


def _quality(moments: AnyMoments, ratio: float) -> dict[str, Any]:
    return {
        "tokens": moments.count,
        "effective_rank": moments.effective_rank,
        "condition": ratio if math.isfinite(ratio) else None,
        "remaining_error": moments.remaining_error(),
    }


def _show(document: dict[str, Any]) -> None:
    _show_layers(
        f"second moments of keys of {document['model']} over {document['corpus']}", document["layers"]
    )
    shown = document.get("pictures")
    if shown:
        _show_layers(f"at pictures' tokens, over {shown['gallery']}", shown["layers"])
    if document["tokens"] < document["tokens_asked"]:
        print(
            f"the corpus ended after {document['tokens']:,} of {document['tokens_asked']:,} tokens; "
            "name a longer one with --corpus"
        )
    print(f"stored in {document['folder']}; seconds: of the one pass over all layers")
    print(f"methods use these statistics with: --set tokens={document['tokens_asked']}")


def _show_layers(title: str, layers: list[dict[str, Any]]) -> None:
    rows = [
        (
            row["layer"],
            f"{row['tokens']:,}",
            f"{row['effective_rank']:.1f} of {row['width']}",
            "singular" if row["condition"] is None else f"{row['condition']:.1e}",
            "unknown" if row["remaining_error"] is None else f"{100 * row['remaining_error']:.1f} %",
            "cached" if row["seconds"] is None else f"{row['seconds']:.1f}",
            Path(row["path"]).name,
        )
        for row in layers
    ]
    common.table(
        title,
        ("layer", "tokens", "effective rank", "condition number", "sampling error", "seconds", "file"),
        rows,
        right=(1, 2, 3, 4, 5),
    )


def _show_cost(document: dict[str, Any], json: bool) -> None:
    if json:
        common.emit(document)
        return
    print(
        f"{document['model']}, layers {', '.join(map(str, document['layers']))}, "
        f"corpus {document['corpus']}: "
        f"{document['tokens']:,} tokens in rows of {document['row_tokens']}, {document['flop']:.1e} FLOP, "
        f"{document['disk_bytes'] / 1e6:.1f} MB in {document['folder']}, twice that while it runs, and "
        f"{document['eigen_bytes'] / 1e6:.1f} MB more if a method needs eigendecompositions"
    )
    if document["kept_already"]:
        print(f"cached already: layers {', '.join(map(str, document['kept_already']))}")
    if "pictures" in document:
        print(f"and as many tokens of pictures at most, over {document['pictures']['gallery']}")
    print("dry run: nothing was computed or written")


VERB = Verb("stats", command, order=120)
