from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """Leave the modules and tests that stay until the end to no later garbage collection: each would walk them all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep statistics made by tests out of the user's cache; all processes of a run have one folder."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / "cache"
        folder.mkdir(exist_ok=True)
    else:
        folder = tmp_path_factory.mktemp("cache")
    old = os.environ.get("ERRATA_CACHE")
    os.environ["ERRATA_CACHE"] = str(folder)
    yield folder
    if old is None:
        del os.environ["ERRATA_CACHE"]
    else:
        os.environ["ERRATA_CACHE"] = old


TOKENS = 20_000
"""Of statistics at most, where a test does not ask for a number; defaults are a million."""


WRITTEN = 48
"""Tokens of each neutral text that a host writes itself for perplexity, instead of 128."""
SAMPLED = 64
"""Tokens of each text that a host without a corpus writes for statistics, instead of 160."""


@pytest.fixture(scope="session", autouse=True)
def short_statistics():
    """Collect less of what is collected for each model and evaluation: it would take minutes. Not in other processes.

    How long an answer takes is measured once, not five times.
    """
    from errata.bench import health, runner
    from errata.locate import contexts
    from errata.methods import _method as methods
    from errata.stats.tables import TableSettings

    whole = methods.Workspace._statistics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "SAMPLED_TOKENS", WRITTEN)
        patch.setattr(health, "REPEATS", 1)
        defaults = contexts.sampled_corpus.__kwdefaults__ or {}
        patch.setattr(contexts.sampled_corpus, "__kwdefaults__", {**defaults, "length": SAMPLED})
        patch.setattr(methods, "TableSettings", partial(TableSettings, texts=640, names=32, templates=64))
        patch.setattr(
            methods.Workspace,
            "_statistics",
            lambda work, host, tokens: whole(work, host, min(tokens, TOKENS)),
        )
        yield


@pytest.fixture(scope="session")
def lab_host():
    import errata

    return errata.load("lab", device="cpu")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent
