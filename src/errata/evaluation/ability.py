"""General ability before and after an edit: lm-evaluation-harness on the live host, and running text.

The harness (Gao et al., "A framework for few-shot language model evaluation"; extra ``ability``) asks the
host in memory, so weights and hooks of an edit that is in place are what it measures. A task is

* a name the harness knows, such as ``hellaswag``, or a ``.yaml`` task file of its own form;
* a ``.jsonl`` file of one's own, offline: lines ``{"question", "answers"}`` for free answers or
  ``{"question", "choices", "label"}`` for a choice, with an optional ``context``;
* a ``.txt`` file: perplexity per token and bits per byte of its paragraphs, without the harness.
"""

from __future__ import annotations

import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errata import files
from errata.edits.group import group
from errata.errors import ConfigError, DataError, listing, shown
from errata.evaluation.likelihood import continuation, continued, rolling, score
from errata.evaluation.metrics import matching, perplexity
from errata.host.load import Host
from errata.registry import nearest

if TYPE_CHECKING:
    from errata.edits.edit import Edit

Tick = Callable[[str, int, int], None]
Found = Mapping[str, Mapping[str, "Measured"]]
"""By task and metric."""

ANSWER_TOKENS = 32
"""Longest free answer of a local task."""
ONE_PROCESS = "DISABLE_MULTIPROC"
"""The harness's environment variable against processes of its own."""
RESAMPLES = 1000
"""Draws for the errors of metrics that have no formula for it."""


@dataclass(frozen=True)
class Measured:
    """One metric of one task on one state of the host."""

    value: float
    stderr: float | None
    """Standard error over documents, as the harness computes it; None where it has none."""
    documents: int | None
    """How many documents the value stands for; None for groups of tasks."""
    each: tuple[float, ...] | None = None
    """The value of every document in order, where the metric is their mean."""


def ability(
    host: Host, tasks: Sequence[str], *, edit: Edit | Sequence[Edit] | None = None,
    limit: int | None = None, seed: int = 0,
    shots: int | None = None, chat: bool = False, on_progress: Tick = lambda what, done, total: None,
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """Measure tasks on a host as it stands, and again with an edit, or all of several, in place.

    Returns ``{task: {metric: {"before", "after", "stderr", "stderr_difference", "n"}}}``. ``stderr`` is that
    of ``after`` (of ``before`` without an edit, where ``after`` is None); ``stderr_difference`` that of
    after - before over the same documents, None for metrics that are no mean over documents; ``n`` counts
    documents. ``limit``: documents per task, the first ones. ``shots``: examples before a question, None
    takes the task's own number. ``chat``: ask through the tokenizer's chat template. ``seed``: of drawn
    examples; the global random state is left as it was.

    Raises ConfigError for unknown tasks and where the harness is not installed, DataError for files that
    cannot be read and data that cannot be had offline.
    """
    if getattr(host.config, "is_encoder_decoder", False):
        raise ConfigError(f"ability is measured on causal language models; {host.name} is an encoder-decoder")
    if not tasks:
        raise ConfigError(
            "no tasks given: expected names of the harness's tasks, .jsonl, .yaml or .txt files"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}: expected a number of documents from 1")
    labels = [Path(name).stem if name.lower().endswith((".txt", ".jsonl")) else name for name in tasks]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(
            f"two tasks are called {', '.join(twice)}; name each once, files by different names"
        )
    texts = {name: _paragraphs(name)[:limit] for name in tasks if name.lower().endswith(".txt")}
    asked = [name for name in tasks if name not in texts]
    harness = _Harness(asked, limit=limit, seed=seed, shots=shots, chat=chat) if asked else None

    def measure(phase: str) -> dict[str, Mapping[str, Measured]]:
        found: dict[str, Mapping[str, Measured]] = {
            Path(name).stem: running_text(host, text) for name, text in texts.items()
        }
        if harness is not None:
            found |= harness.run(host, lambda what, done, total: on_progress(f"{phase}: {what}", done, total))
        return found

    before = measure("before")
    edits = group(edit)
    if edits is None:
        return _table(before, None)
    with edits.on(host):
        after = measure("after")
    return _table(before, after)


def _table(before: Found, after: Found | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Put both sides together."""

    def entry(old: Measured, new: Measured | None) -> dict[str, Any]:
        return {
            "before": old.value,
            "after": None if new is None else new.value,
            "stderr": (new or old).stderr,
            "stderr_difference": None if new is None else _paired_error(old.each, new.each),
            "n": old.documents,
        }

    return {
        task: {
            metric: entry(old, None if after is None else after[task][metric])
            for metric, old in metrics.items()
        }
        for task, metrics in before.items()
    }


def _paired_error(old: Sequence[float] | None, new: Sequence[float] | None) -> float | None:
    """Standard error of the mean difference over the same documents."""
    if old is None or new is None or len(old) != len(new) or len(old) < 2:
        return None
    differences = [b - a for a, b in zip(old, new, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return math.sqrt(variance / len(differences))


# --- running text ---------------------------------------------------------------------------


def running_text(host: Host, texts: Sequence[str]) -> dict[str, Measured]:
    """Return perplexity per token and bits per byte of texts, all tokens and bytes of all texts together.

    With L_i the negative log-probability of text i in nats, t_i its tokens and b_i its UTF-8 bytes:
    perplexity = exp(sum L / sum t), bits per byte = sum L / (ln 2 * sum b). Standard errors are those of a
    ratio of sums over texts (linearised), None for a single text. Bits per byte compare models of
    different vocabularies, perplexity does not.
    """
    scored = [torch.tensor(said, dtype=torch.float64) for said in rolling(host, texts)]
    losses = [-float(said.sum()) for said in scored]
    sizes = [len(text.encode()) for text in texts]
    per_token = perplexity.of_texts(scored)
    token_error = _ratio_error(losses, [len(said) for said in scored])
    byte_error = _ratio_error(losses, sizes)
    return {
        # d exp(x) = exp(x) dx
        "perplexity": Measured(
            per_token, None if token_error is None else per_token * token_error, len(texts)
        ),
        "bits_per_byte": Measured(
            perplexity.bits_per_byte(scored, sum(sizes)),
            None if byte_error is None else byte_error / math.log(2),
            len(texts),
        ),
    }


def _ratio_error(above: Sequence[float], below: Sequence[int]) -> float | None:
    """Return the standard error of sum(above) / sum(below) over the pairs; None for one, or beyond numbers."""
    total, n = sum(below), len(below)
    ratio = sum(above) / total
    if n < 2 or not math.isfinite(ratio):
        return None
    spread = sum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    return math.sqrt(spread * n / (n - 1)) / total


# --- the harness ----------------------------------------------------------------------------


class _Harness:
    """Some tasks of the harness, built once and asked as often as the host changes."""

    def __init__(
        self, names: Sequence[str], *, limit: int | None, seed: int, shots: int | None, chat: bool
    ) -> None:
        _need_harness()
        self.limit, self.seed, self.chat = limit, seed, chat
        self.tasks: Any = {"tasks": {}, "groups": {}, "group_map": {}}
        local = {name: _local_rows(Path(name)) for name in names if name.lower().endswith(".jsonl")}
        with _contained(seed):
            for name, rows in local.items():
                self._take({"tasks": {Path(name).stem: _local_task(Path(name), rows)}}, name)
            for name, loaded in _known_tasks([name for name in names if name not in local]):
                self._take(loaded, name)
        for task in self.tasks["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):  # a task that says 0 means it
                task.set_config("num_fewshot", shots or 0)

    def _take(self, loaded: Mapping[str, Mapping[str, Any]], name: str) -> None:
        for kind, entries in loaded.items():
            twice = sorted(entries.keys() & self.tasks[kind].keys())
            if twice:
                raise ConfigError(
                    f"task {name!r} brings {', '.join(twice)} a second time; name each task once"
                )
            self.tasks[kind] |= entries

    def run(self, host: Host, tick: Tick) -> dict[str, Mapping[str, Measured]]:
        """Ask the host as it stands; in one process the harness always returns its results."""
        from lm_eval.evaluator import evaluate

        for task in self.tasks["tasks"].values():
            task.set_fewshot_seed(self.seed)
        with _contained(self.seed):
            results: Any = evaluate(
                _language_model(host, tick), self.tasks, limit=self.limit, bootstrap_iters=RESAMPLES,
                apply_chat_template=self.chat, fewshot_as_multiturn=self.chat,
            )  # fmt: skip
        return {task: _measured(task, numbers, results) for task, numbers in results["results"].items()}


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "general ability is measured with lm-evaluation-harness; pip install 'errata[ability]' "
            "(a .txt file needs no extra)"
        ) from error


def _known_tasks(names: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Build tasks of the harness, with their data. Raises ConfigError, or DataError without the data."""
    if not names:
        return
    from lm_eval.tasks import TaskManager

    files = {name for name in names if Path(name).suffix in (".yaml", ".yml") and Path(name).exists()}
    manager = TaskManager(include_defaults=len(files) < len(names))  # its own catalogue takes seconds to read
    for name in names:
        if name not in files and name not in manager.task_index:
            near = nearest(name, manager.all_tasks)
            hint = f"did you mean {near!r}? " if near else ""
            raise ConfigError(
                f"unknown task {name!r}: {hint}expected a task of lm-evaluation-harness (lm-eval ls tasks "
                "lists them), or a file that ends in .jsonl, .yaml or .txt"
            )
    for name in names:
        try:
            yield name, manager.load([name])
        except ImportError as error:
            raise ConfigError(f"task {name!r} needs a package that is not installed: {error}") from error
        except Exception as error:  # the harness may trip over anything in a strange file
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"task {name!r} cannot be set up: {first}; if its data are what is missing, fetch them once where "
                "there is a network (the datasets library keeps them); a .jsonl file of your own works offline"
            ) from error


def _language_model(host: Host, tick: Tick) -> Any:
    """Wrap a host as the harness wants it; it holds no copy, so edits in place are what it sees."""
    from lm_eval.api.model import LM

    class Live(LM):
        """The host as it stands."""

        @property
        def tokenizer_name(self) -> str:
            """Whose chat template it is."""
            return host.name

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """Score continuations."""
            asked = [continuation(host, *request.args) for request in requests]
            found = score(host, asked, on_rows=lambda done, total: tick("likelihoods", done, total))
            return [(sum(said), all(first)) for said, first in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:  # type: ignore[override]
            """Score whole texts."""
            texts = [request.args[0] for request in requests]
            found = rolling(host, texts, on_rows=lambda done, total: tick("texts", done, total))
            return [sum(said) for said in found]

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Continue prompts greedily."""
            return _generated(host, [request.args for request in requests], tick)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """Write a conversation as one prompt."""
            return host.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

    return Live()


def _generated(host: Host, asked: Sequence[tuple[str, Mapping[str, Any]]], tick: Tick) -> list[str]:
    """Continue prompts, those with the same settings together. Raises ConfigError where one asks to sample."""
    groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for i, (_, settings) in enumerate(asked):
        if settings.get("do_sample") and float(settings.get("temperature") or 0) > 0:
            raise ConfigError(
                "a task asks for sampled answers (do_sample: true); ability compares greedy ones: "
                "copy the task's .yaml and set do_sample: false"
            )
        until = settings.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
        groups.setdefault((stops, limit), []).append(i)
    texts, before = [""] * len(asked), 0
    for (stops, limit), members in groups.items():
        prompts = [asked[i][0] for i in members]
        made = continued(
            host, prompts, stops, limit,
            on_rows=lambda done, _, before=before: tick("answers", before + done, len(asked)),
        )  # fmt: skip
        for i, text in zip(members, made, strict=True):
            texts[i] = text
        before += len(members)
    return texts


def _measured(task: str, numbers: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Measured]:
    """Read one task's numbers out of the harness's results: ``metric,filter`` and ``metric_stderr,filter``."""
    samples = results.get("samples", {}).get(task, [])
    counts = results.get("n-samples", {}).get(task, {})
    found = {}
    for key, value in numbers.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{metric}_stderr,{kind}")
        each = tuple(sample.get(metric) for sample in samples if sample["filter"] == kind)
        plain = bool(each) and all(isinstance(v, (bool, int, float)) for v in each)
        mean = plain and math.isclose(sum(each) / len(each), value, rel_tol=1e-9, abs_tol=1e-12)
        found[metric if kind == "none" else f"{metric},{kind}"] = Measured(
            float(value),
            float(error) if isinstance(error, (int, float)) else None,
            counts.get("effective"),
            tuple(map(float, each)) if mean else None,
        )
    return found


@contextmanager
def _contained(seed: int) -> Iterator[None]:
    """Keep the harness to itself: seeded, and random states, standard output and processes left alone.

    Tasks may draw from the global states; some metrics' errors come from forked processes, with a print.
    """
    import numpy

    state, array_state = random.getstate(), numpy.random.get_state()
    alone = os.environ.get(ONE_PROCESS)
    os.environ[ONE_PROCESS] = "1"
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), redirect_stdout(sys.stderr):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            numpy.random.set_state(array_state)
            os.environ.pop(ONE_PROCESS)
            if alone is not None:
                os.environ[ONE_PROCESS] = alone


# --- one's own tasks ------------------------------------------------------------------------


def _lines(path: Path) -> str:
    return files.read_text(path, DataError, what="task")


def _paragraphs(name: str) -> list[str]:
    """Read a text file's paragraphs, which empty lines part."""
    found = [part.strip() for part in re.split(r"\n\s*\n", _lines(Path(name))) if part.strip()]
    if not found:
        raise DataError(f"task {name} holds no text")
    return found


def _local_rows(path: Path) -> list[dict[str, Any]]:
    """Read a task of one's own. Raises DataError listing every line that is not as it should be."""
    rows, complaints = [], []
    for number, line in enumerate(_lines(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(_local_row(files.parse_json(line, DataError)))
        except (DataError, ValueError) as error:
            complaints.append(f"{path}, line {number}: {error}")
    if not complaints and not rows:
        complaints.append(f"{path} holds no lines")
    if not complaints and len({frozenset(row) for row in rows}) > 1:
        complaints.append(f"{path}: lines with answers and lines with choices; make them two files")
    if complaints:
        raise DataError(listing(complaints))
    return rows


def _local_row(record: Any) -> dict[str, Any]:
    """Turn one line into prompt with answers, or prompt with choices and label. Raises ValueError."""
    if not isinstance(record, dict) or not _is_text(record.get("question")):
        raise ValueError('expected {"question": "..."} with "answers" or "choices" and "label"')
    question = record["question"].strip()
    asks = question.endswith("?")
    prompt = f"Question: {question}\nAnswer:" if asks else question
    context = record.get("context")
    if context is not None:
        if not isinstance(context, str):
            raise ValueError(f"context: expected a text, found {shown(context, 60)}")
        prompt = f"{context.strip()}\n\n{prompt}"
    if "choices" in record:
        return {"prompt": prompt, **_choice(record)}
    answers = record.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
        raise ValueError(f"answers: expected texts, found {shown(record.get('answers'), 60)}")
    return {"prompt": prompt, "answers": answers}


def _choice(record: Mapping[str, Any]) -> dict[str, Any]:
    choices, label = record["choices"], record.get("label")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ValueError(f"choices: expected two texts or more, found {shown(choices, 60)}")
    if isinstance(label, str) and choices.count(label) == 1:
        label = choices.index(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise ValueError(f"label: expected one of the choices or its number from 0, found {shown(label, 60)}")
    return {"choices": choices, "label": label}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _local_task(path: Path, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Make a task of rows in memory, so that nothing is cached and nothing looked up."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    class Local(ConfigurableTask):
        """A task whose data are at hand."""

        def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
            """Take the rows as they are."""
            self.dataset = {"test": datasets.Dataset.from_list([dict(row) for row in rows])}

    config: dict[str, Any] = {"task": path.stem, "test_split": "test", "doc_to_text": "prompt"}
    if "choices" in rows[0]:
        scores = ("acc", "acc_norm")
        config |= {"output_type": "multiple_choice", "doc_to_target": "label", "doc_to_choice": "choices"}
    else:
        scores = ("answered", "exact")
        stops = {"until": ["\n"], "max_gen_toks": ANSWER_TOKENS, "do_sample": False}
        config |= {"output_type": "generate_until", "doc_to_target": "answers", "generation_kwargs": stops}
        config["process_results"] = _answer_scores
    config["metric_list"] = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in scores
    ]
    return Local(config=config)


def _answer_scores(row: Mapping[str, Any], said: Sequence[str]) -> dict[str, float]:
    """``answered``: an alias in the first sentence; ``exact``: nothing but an alias, once normalised."""
    return {
        "answered": float(matching.says(said[0], row["answers"])),
        "exact": float(matching.exact(said[0], row["answers"])),
    }
