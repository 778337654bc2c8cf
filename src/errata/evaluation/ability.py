"""General ability before and after an edit: lm-evaluation-harness on the live host, and perplexity of texts.

The harness (Gao et al., "A framework for few-shot language model evaluation"; extra ``ability``) runs
the host in memory, so it measures the weights and hooks of an edit that is in place. A task is

* a name the harness knows, such as ``hellaswag``, or a ``.yaml`` task file in its format;
* a local ``.jsonl`` file, which needs no network: lines ``{"question", "answers"}`` for free answers or
  ``{"question", "choices", "label"}`` for multiple choice, with an optional ``context``;
* a ``.txt`` file: perplexity per token and bits per byte of its paragraphs, without the harness.
"""

from __future__ import annotations

import math
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from errata import files
from errata.edits.group import group
from errata.errors import ConfigError, DataError, listing, shown
from errata.evaluation.likelihood import continuation, generate_texts, rolling, score
from errata.evaluation.metrics import matching, perplexity
from errata.host.host import Host
from errata.progress import OnProgress, ignore
from errata.registry import nearest

if TYPE_CHECKING:
    from errata.edits.edit import Edit

Results = Mapping[str, Mapping[str, "Measurement"]]
"""Measurements by task and metric."""

ANSWER_TOKENS = 32
"""Maximum tokens of a generated answer in a local task."""
ONE_PROCESS = "DISABLE_MULTIPROC"
"""Environment variable that keeps the harness from starting processes."""
RESAMPLES = 1000
"""Bootstrap resamples for the standard errors of metrics without a formula for it."""


@dataclass(frozen=True)
class Measurement:
    """One metric of one task on one state of the host."""

    value: float
    stderr: float | None
    """Standard error over documents, as the harness computes it; None where it has none."""
    documents: int | None
    """Number of documents that the value covers; None for groups of tasks."""
    each: tuple[float, ...] | None = None
    """The value of every document in order, where the metric is their mean."""


def ability(
    host: Host, tasks: Sequence[str], *, edit: Edit | Sequence[Edit] | None = None,
    limit: int | None = None, seed: int = 0,
    shots: int | None = None, chat: bool = False, on_progress: OnProgress = ignore,
) -> dict[str, dict[str, dict[str, Any]]]:  # fmt: skip
    """Evaluate tasks on a host in its present state, and again with an edit, or several together, in place.

    Returns ``{task: {metric: {"before", "after", "stderr", "stderr_difference", "n"}}}``. ``stderr`` is that
    of ``after`` (of ``before`` without an edit, where ``after`` is None); ``stderr_difference`` that of
    after - before over the same documents, None for metrics that are not a mean over documents; ``n`` counts
    documents. ``limit``: documents per task, the first ones. ``shots``: examples before a question, None
    uses the task's own number. ``chat``: apply the tokenizer's chat template. ``seed``: for sampled
    few-shot examples; the global random state is left unchanged.

    Raises ConfigError for unknown tasks and where the harness is not installed, DataError for files that
    cannot be read and data that are not available offline.
    """
    if host.reads_by_encoder:
        raise ConfigError(f"ability is measured on causal language models; {host.name} is an encoder-decoder")
    if not tasks:
        raise ConfigError(
            "no tasks given: expected names of the harness's tasks, .jsonl, .yaml or .txt files"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit}: expected a number of documents from 1")
    labels = [Path(name).stem if name.lower().endswith((".txt", ".jsonl")) else name for name in tasks]
    duplicates = sorted({label for label in labels if labels.count(label) > 1})
    if duplicates:
        raise ConfigError(
            f"two tasks are called {', '.join(duplicates)}; name each once, files by different names"
        )
    texts = {name: _paragraphs(name)[:limit] for name in tasks if name.lower().endswith(".txt")}
    harness_tasks = [name for name in tasks if name not in texts]
    harness = (
        _Harness(harness_tasks, limit=limit, seed=seed, shots=shots, chat=chat) if harness_tasks else None
    )

    def measure(phase: str) -> dict[str, Mapping[str, Measurement]]:
        results: dict[str, Mapping[str, Measurement]] = {
            Path(name).stem: running_text(host, text) for name, text in texts.items()
        }
        if harness is not None:
            results |= harness.run(
                host, lambda what, completed, total: on_progress(f"{phase}: {what}", completed, total)
            )
        return results

    before = measure("before")
    edits = group(edit)
    if edits is None:
        return _table(before, None)
    with edits.on(host):
        after = measure("after")
    return _table(before, after)


def _table(before: Results, after: Results | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the values before and after by task and metric."""

    def entry(old: Measurement, new: Measurement | None) -> dict[str, Any]:
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
    """Return the standard error of the mean difference over the same documents; None where it is undefined."""
    if old is None or new is None or len(old) != len(new) or len(old) < 2:
        return None
    differences = [b - a for a, b in zip(old, new, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return math.sqrt(variance / len(differences))


# --- running text ---------------------------------------------------------------------------


def running_text(host: Host, texts: Sequence[str]) -> dict[str, Measurement]:
    """Return perplexity per token and bits per byte of texts, all tokens and bytes of all texts together.

    With L_i the negative log-probability of text i in nats, t_i its tokens and b_i its UTF-8 bytes:
    perplexity = exp(sum L / sum t), bits per byte = sum L / (ln 2 * sum b). Standard errors are those of a
    ratio of sums over texts (linearised), None for a single text. Bits per byte can be compared
    between models of different vocabularies, perplexity cannot.
    """
    logprobs = [torch.tensor(row, dtype=torch.float64) for row in rolling(host, texts)]
    losses = [-float(row.sum()) for row in logprobs]
    sizes = [len(text.encode()) for text in texts]
    per_token = perplexity.of_texts(logprobs)
    token_error = _ratio_error(losses, [len(row) for row in logprobs])
    byte_error = _ratio_error(losses, sizes)
    return {
        # d exp(x) = exp(x) dx
        "perplexity": Measurement(
            per_token, None if token_error is None else per_token * token_error, len(texts)
        ),
        "bits_per_byte": Measurement(
            perplexity.bits_per_byte(logprobs, sum(sizes)),
            None if byte_error is None else byte_error / math.log(2),
            len(texts),
        ),
    }


def _ratio_error(above: Sequence[float], below: Sequence[int]) -> float | None:
    """Return the standard error of sum(above) / sum(below) over the pairs; None for one pair or a non-finite ratio."""
    total, n = sum(below), len(below)
    ratio = sum(above) / total
    if n < 2 or not math.isfinite(ratio):
        return None
    squares = sum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    return math.sqrt(squares * n / (n - 1)) / total


# --- the harness ----------------------------------------------------------------------------


class _Harness:
    """Tasks of the harness, built once and evaluated on each state of the host."""

    def __init__(
        self, names: Sequence[str], *, limit: int | None, seed: int, shots: int | None, chat: bool
    ) -> None:
        _need_harness()
        self.limit, self.seed, self.chat = limit, seed, chat
        self.tasks: Any = {"tasks": {}, "groups": {}, "group_map": {}}
        local = {name: _local_rows(Path(name)) for name in names if name.lower().endswith(".jsonl")}
        with _isolated_harness(seed):
            for name, rows in local.items():
                self._take({"tasks": {Path(name).stem: _local_task(Path(name), rows)}}, name)
            for name, task_tree in _load_tasks([name for name in names if name not in local]):
                self._take(task_tree, name)
        for task in self.tasks["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):  # a task with 0 is zero-shot by definition
                task.set_config("num_fewshot", shots or 0)

    def _take(self, task_tree: Mapping[str, Mapping[str, Any]], name: str) -> None:
        for kind, entries in task_tree.items():
            duplicates = sorted(entries.keys() & self.tasks[kind].keys())
            if duplicates:
                raise ConfigError(
                    f"task {name!r} includes {', '.join(duplicates)} a second time; name each task once"
                )
            self.tasks[kind] |= entries

    def run(self, host: Host, tick: OnProgress) -> dict[str, Mapping[str, Measurement]]:
        """Evaluate the tasks on the host in its present state."""
        from lm_eval.evaluator import evaluate

        for task in self.tasks["tasks"].values():
            task.set_fewshot_seed(self.seed)
        with _isolated_harness(self.seed):
            results: Any = evaluate(
                _language_model(host, tick), self.tasks, limit=self.limit, bootstrap_iters=RESAMPLES,
                apply_chat_template=self.chat, fewshot_as_multiturn=self.chat,
            )  # fmt: skip
        return {task: _read_results(task, numbers, results) for task, numbers in results["results"].items()}


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "general ability is measured with lm-evaluation-harness; pip install 'errata[ability]' "
            "(a .txt file needs no extra)"
        ) from error


def _load_tasks(names: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Build tasks of the harness, with their data. Raises ConfigError, or DataError without the data."""
    if not names:
        return
    from lm_eval.tasks import TaskManager

    files = {name for name in names if Path(name).suffix in (".yaml", ".yml") and Path(name).exists()}
    # reading the harness's own catalogue takes seconds
    manager = TaskManager(include_defaults=len(files) < len(names))
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
        except Exception as error:  # the harness may raise anything for a malformed file
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"task {name!r} cannot be set up: {first}; if its data are missing, download them once where "
                "there is a network (the datasets library caches them); a local .jsonl file works offline"
            ) from error


def _language_model(host: Host, tick: OnProgress) -> Any:
    """Wrap a host in the harness's model interface, without a copy, so edits in place take effect."""
    from lm_eval.api.model import LM

    class Live(LM):
        """The host in its present state."""

        @property
        def tokenizer_name(self) -> str:
            """Return the name of the chat template's tokenizer."""
            return host.name

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """Return the log-probability of each continuation and whether it is the greedy one."""
            answers = [continuation(host, *request.args) for request in requests]
            scores = score(
                host, answers, on_rows=lambda completed, total: tick("likelihoods", completed, total)
            )
            return [(sum(logprobs), all(is_greedy)) for logprobs, is_greedy in scores]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:  # type: ignore[override]
            """Return the log-probability of each text."""
            texts = [request.args[0] for request in requests]
            logprobs = rolling(host, texts, on_rows=lambda completed, total: tick("texts", completed, total))
            return [sum(row) for row in logprobs]

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Continue prompts greedily."""
            return _generate(host, [request.args for request in requests], tick)

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """Return a conversation as one prompt."""
            return host.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

    return Live()


def _generate(host: Host, calls: Sequence[tuple[str, Mapping[str, Any]]], tick: OnProgress) -> list[str]:
    """Generate after prompts, in batches with equal settings. Raises ConfigError where a task requires sampling."""
    groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for i, (_, settings) in enumerate(calls):
        if settings.get("do_sample") and float(settings.get("temperature") or 0) > 0:
            raise ConfigError(
                "a task requires sampled answers (do_sample: true); ability compares greedy ones: "
                "copy the task's .yaml and set do_sample: false"
            )
        until = settings.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
        groups.setdefault((stops, limit), []).append(i)
    texts, finished = [""] * len(calls), 0
    for (stops, limit), members in groups.items():
        prompts = [calls[i][0] for i in members]
        group_texts = generate_texts(
            host, prompts, stops, limit,
            on_rows=lambda completed, _, finished=finished: tick("answers", finished + completed, len(calls)),
        )  # fmt: skip
        for i, text in zip(members, group_texts, strict=True):
            texts[i] = text
        finished += len(members)
    return texts


def _read_results(
    task: str, numbers: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Measurement]:
    """Return one task's metrics from the harness's results: ``metric,filter`` and ``metric_stderr,filter``."""
    samples = results.get("samples", {}).get(task, [])
    counts = results.get("n-samples", {}).get(task, {})
    measurements = {}
    for key, value in numbers.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = numbers.get(f"{metric}_stderr,{filter_name}")
        values = tuple(sample.get(metric) for sample in samples if sample["filter"] == filter_name)
        numeric = bool(values) and all(isinstance(v, (bool, int, float)) for v in values)
        is_mean = numeric and math.isclose(sum(values) / len(values), value, rel_tol=1e-9, abs_tol=1e-12)
        measurements[metric if filter_name == "none" else f"{metric},{filter_name}"] = Measurement(
            float(value),
            float(stderr) if isinstance(stderr, (int, float)) else None,
            counts.get("effective"),
            tuple(map(float, values)) if is_mean else None,
        )
    return measurements


@contextmanager
def _isolated_harness(seed: int) -> Iterator[None]:
    """Seed the harness, run it in one process, send its output to stderr, and restore the global random states.

    Tasks may sample from the global states; some metrics compute errors in forked processes, which print.
    """
    import numpy

    state, array_state = random.getstate(), numpy.random.get_state()
    previous = os.environ.get(ONE_PROCESS)
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
            if previous is not None:
                os.environ[ONE_PROCESS] = previous


# --- local tasks ------------------------------------------------------------------------------


def _lines(path: Path) -> str:
    return files.read_text(path, DataError, what="task")


def _paragraphs(name: str) -> list[str]:
    """Read a text file's paragraphs, which are separated by empty lines."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", _lines(Path(name))) if part.strip()]
    if not paragraphs:
        raise DataError(f"task {name} contains no text")
    return paragraphs


def _local_rows(path: Path) -> list[dict[str, Any]]:
    """Read a local task. Raises DataError listing every invalid line."""
    rows, complaints = [], []
    for number, line in enumerate(_lines(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(_local_row(files.parse_json(line, DataError)))
        except (DataError, ValueError) as error:
            complaints.append(f"{path}, line {number}: {error}")
    if not complaints and not rows:
        complaints.append(f"{path} contains no lines")
    if not complaints and len({frozenset(row) for row in rows}) > 1:
        complaints.append(f"{path}: lines with answers and lines with choices; split them into two files")
    if complaints:
        raise DataError(listing(complaints))
    return rows


def _local_row(record: Any) -> dict[str, Any]:
    """Convert one record to a prompt with answers, or with choices and label. Raises ValueError."""
    if not isinstance(record, dict) or not _is_text(record.get("question")):
        raise ValueError('expected {"question": "..."} with "answers" or "choices" and "label"')
    question = record["question"].strip()
    is_question = question.endswith("?")
    prompt = f"Question: {question}\nAnswer:" if is_question else question
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
    """Return a task on rows in memory, so that nothing is cached or downloaded."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    class Local(ConfigurableTask):
        """A task whose data are in memory."""

        def download(self, dataset_kwargs: Any = None, **kwargs: Any) -> None:
            """Use the rows in memory instead of a download."""
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


def _answer_scores(row: Mapping[str, Any], texts: Sequence[str]) -> dict[str, float]:
    """Return ``answered``: an alias in the first sentence; ``exact``: nothing but an alias, after normalisation."""
    return {
        "answered": float(matching.says(texts[0], row["answers"])),
        "exact": float(matching.exact(texts[0], row["answers"])),
    }
