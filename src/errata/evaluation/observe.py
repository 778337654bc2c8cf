"""Observe a host's answers to probes. Evaluation runs the model only here; nothing is scored here.

Rows are sorted by length and padded in batches of bounded size, so a probe's answer does not depend on the other rows
beyond rounding. Identical work of several probes is done once: a prompt is run once for its continuation and for all
answers scored after it, and scores after a text are read from any row that begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errata.errors import ConfigError, RequestError
from errata.evaluation import thinking
from errata.evaluation.steps import Walk, walk
from errata.host import prompts, tokens
from errata.host.generate import draw_rows, generate_rows
from errata.host.host import Host
from errata.host.prompts import Template
from errata.host.routed import Routes, mixtures, routed
from errata.progress import OnCount, ignore
from errata.types import DEFAULT_ASK, AskOptions, Case, Form, Observation, Probe, kind_of

if TYPE_CHECKING:  # opens transformers
    from errata.host.decoding import Prefixes
    from errata.host.stopping import Stop

Ids = tuple[int, ...]

SCORE_TOKENS = 8192
GENERATE_TOKENS = 8192
OPEN_TOKENS = 100
"""Tokens of running text, the prompt's included (ROME's fluency, arXiv 2202.05262)."""
OPEN_TOP_K = 5

TEXT_TOKENS = 256
"""Maximum number of tokens scored of a running text."""
LOGITS = 2**27
"""Maximum number of logits in memory: half a gigabyte in float32."""

MOST_CASES = 20
"""Maximum number of cases listed in an error."""

GENERATED_FORMS: frozenset[Form] = frozenset({"short", "long", "thought", "open", "steps"})
"""Forms with generated text; the others are only scored."""


@dataclass(frozen=True)
class _Decoding:
    """How to generate after a prompt; prompts with equal settings are batched together."""

    limit: int
    """Maximum number of new tokens; of a sampled text, of all tokens."""
    stop: Stop = "sentence"
    sample: bool = False
    block: str = ""
    """Opening tag of a thinking block that the prompt leaves open."""
    forced: bool = False
    """Whether thoughts alone are generated, for an answer that is asked for behind them."""


@dataclass(frozen=True)
class _Plan:
    """The tokenised work for one probe."""

    decoding: _Decoding | None
    prompt: Ids
    """Token ids to generate after."""
    base: Ids
    """Token ids before the answers to score, and before the next-token distribution."""
    answer: tokens.Answer | None
    rival: tokens.Answer | None
    choices: tuple[tokens.Answer, ...]
    spread: bool
    """Whether to record the whole next-token distribution."""
    frame: prompts.Framed
    """The prompt as it is continued."""


@dataclass(frozen=True)
class _PromptSettings:
    """The settings of :func:`observe` that determine prompts and answers."""

    host: Host
    """The host with the requested prompt format."""
    plain: Host
    """The same host with unformatted prompts."""
    options: AskOptions

    def plan(self, probe: Probe) -> _Plan:
        """Tokenise a probe's prompt and answers."""
        context = self.options.context
        text = f"{context.rstrip()}\n\n{probe.prompt}" if context.strip() else probe.prompt
        host = self.plain if self._uncued(probe.form) else self.host
        thinks = probe.form == "short" and thinking.mode_of(self.options)
        if thinks and self.options.thinking_template is not None:
            host, text = self.plain, thinking.written(self.options, text)
        frame = host.frame(text)
        if thinks == "forced":
            frame = thinking.opened(frame)
        decoding = self._decoding(probe.form, frame, forced=thinks == "forced")
        has_answer = probe.form not in ("open", "steps")  # of steps, the answer's prompt is not known yet
        answers = [
            self._answer(host, text, answer, probe.form)
            for answer in (*probe.answers[: int(has_answer)], *probe.choices)
        ]
        first = answers.pop(0) if has_answer and probe.answers else None
        slots = len(first.target) if first is not None else None  # number of mask tokens for a masked model
        rival = (
            None
            if probe.rival is None or not has_answer
            else self._answer(host, text, probe.rival, probe.form)
        )
        return _Plan(
            decoding, host.encode_framed(frame, slots=slots), host.encode_base(text), first, rival, tuple(answers),
            kind_of(probe.kind).distribution, frame,
        )  # fmt: skip

    @property
    def _template(self) -> Template:
        """The template, with ``auto`` resolved."""
        template = self.host.prompt_format.template
        if template == "auto":
            return "chat" if tokens.has_chat(self.host.tokenizer) else "question"
        return template

    def _uncued(self, form: Form) -> bool:
        """Whether a form's prompt is not formatted: open text never is, choices and spans get no answer cue."""
        return form == "open" or (self._template == "question" and form in ("choice", "span"))

    def _decoding(self, form: Form, frame: prompts.Framed, *, forced: bool = False) -> _Decoding | None:
        options = self.options
        if not options.generate or form not in GENERATED_FORMS:
            return None
        if form == "open":
            return _Decoding(OPEN_TOKENS, sample=True)
        limit = {
            "short": options.max_new_tokens, "steps": options.max_new_tokens,
            "thought": options.thought_tokens, "long": options.long_tokens,
        }[form]  # fmt: skip
        if forced:
            return _Decoding(options.thought_tokens, "end", block=frame.open_block, forced=True)
        if not frame.special or frame.open_block:
            thinks = frame.text != frame.scored
            return _Decoding(limit + options.thought_tokens * int(thinks), "end", block=frame.open_block)
        if form in ("short", "steps"):
            return _Decoding(limit, "sentence" if self._template == "raw" else "line")
        return _Decoding(limit, "thought" if form == "thought" else "passage")

    def _answer(self, host: Host, prompt: str, answer: str, form: Form) -> tokens.Answer:
        """Tokenise an answer behind its prompt; a long one is truncated."""
        row = encode_behind(host, prompt, answer)
        if form == "long" and host.window is not None and not host.fills:
            excess = host.length(row.ids) - host.window
            if 0 < excess < len(row.target):
                row = tokens.Answer(row.ids[:-excess], row.start)
        return row


def encode_behind(host: Host, prompt: str, answer: str) -> tokens.Answer:
    """Tokenise an answer behind its prompt, with at least one token before it: else the begin token."""
    row = host.encode_answer(prompt, answer)
    if row.start:
        return row
    begin = host.encode_base(prompt)
    return tokens.Answer((*begin, *row.ids), len(begin))


def observe(
    host: Host,
    probes: Sequence[Probe],
    options: AskOptions = DEFAULT_ASK,
    *,
    seed: int = 0,
    batch_tokens: int = SCORE_TOKENS,
    on_progress: OnCount = ignore,
) -> list[Observation]:
    """Return the host's observation for each probe: generated text and log-probabilities, depending on its form.

    Texts are greedy and end at their natural stop; those of form ``open`` are sampled among the five most
    probable tokens, each with its own random generator from ``seed``.

    ``options``: how prompts are formatted, where what is left out is the host's own format, and the longest answer
    of each form. Raw prompts are continued as they are; behind the cue of ``question`` a short answer ends at a line
    break; in a conversation the answer ends where the model ends it, and a model that may think first gets
    ``thought_tokens`` more. Log-probabilities are taken behind the same text, with its thinking block closed.

    Raises ConfigError for a template that is not known or not there, RequestError for a prompt or answer that
    does not fit the window.
    """
    host.see(probes)
    prompt_settings = _make_prompt_settings(host, options)
    plans = [prompt_settings.plan(probe) for probe in probes]
    for probe, plan in zip(probes, plans, strict=True):
        if (complaint := _too_long(host, plan)) is not None:
            raise RequestError(f"{probe.kind} probe {probe.prompt!r:.80}: {complaint}")
    after = _PrefixScorer(host, batch_tokens)
    for plan in plans:
        after.ask(plan)
    texts = _run(host, plans, after, seed, on_progress)
    walks = _walk(prompt_settings, probes, plans, texts, batch_tokens)
    _force(prompt_settings, plans, texts, batch_tokens)
    asked = list(dict.fromkeys(plan.base for plan in plans if plan.spread))
    routes = dict(zip(asked, routed(host, asked), strict=True))
    observations = []
    for probe, plan in zip(probes, plans, strict=True):
        answer_logprobs, top = after.of(plan.answer)
        text, trace = ("", "") if plan.decoding is None else texts[plan.decoding, plan.prompt]
        if probe in walks:
            text, trace = walks[probe].answer, walks[probe].trace
        spread = after.spread[plan.base] if plan.spread else None
        rival_logprobs, choices = after.of(plan.rival)[0], tuple(after.of(c)[0] for c in plan.choices)
        own = routes.get(plan.base, ())
        observations.append(
            Observation(text, answer_logprobs, top, rival_logprobs, spread, choices, own, trace)
        )
    return observations


def _force(
    settings: _PromptSettings, plans: Sequence[_Plan], texts: dict[tuple[_Decoding, Ids], tuple[str, str]],
    batch_tokens: int,
) -> None:  # fmt: skip
    """Ask for the answers behind thoughts that were forced to end, and put them beside these into ``texts``."""
    thought = {
        (plan.decoding, plan.prompt): plan for plan in plans
        if plan.decoding is not None and plan.decoding.forced
    }  # fmt: skip
    answering: dict[tuple[_Decoding, Ids], _Plan] = {}
    for key, plan in thought.items():
        frame = thinking.forced(plan.frame, texts[key][1])
        ids = settings.plain.encode_framed(frame)
        answer = _Decoding(settings.options.max_new_tokens, "line")
        further = replace(plan, decoding=answer, prompt=ids, base=ids, answer=None, rival=None, spread=False)
        if (complaint := _too_long(settings.host, further)) is not None:
            raise RequestError(
                f"thoughts after {plan.frame.text[-80:]!r}: {complaint}, or lower thought_tokens"
            )
        answering[key] = further
    if not answering:
        return
    new = _run(settings.host, list(answering.values()), _PrefixScorer(settings.host, batch_tokens), 0, ignore)
    for key, plan in answering.items():
        assert plan.decoding is not None
        texts[key] = (new[plan.decoding, plan.prompt][0], texts[key][1])


def _walk(
    settings: _PromptSettings, probes: Sequence[Probe], plans: Sequence[_Plan], texts: Mapping[Any, tuple[str, str]],
    batch_tokens: int,
) -> dict[Probe, Walk]:  # fmt: skip
    """Go the further steps of probes of form ``steps`` from their first answers; none without generation."""
    stepping = {probe: plan for probe, plan in zip(probes, plans, strict=True) if probe.form == "steps"}
    if not stepping or not settings.options.generate:
        return {}

    def ask(prompts: Sequence[str]) -> list[str]:
        further = [
            settings.plan(Probe("step", prompt, (), (), form="steps", steps=("{}",))) for prompt in prompts
        ]
        for prompt, plan in zip(prompts, further, strict=True):
            if (complaint := _too_long(settings.host, plan)) is not None:
                raise RequestError(f"step {prompt!r:.80}: {complaint}")
        new = _run(settings.host, further, _PrefixScorer(settings.host, batch_tokens), 0, ignore)
        return ["" if plan.decoding is None else new[plan.decoding, plan.prompt][0] for plan in further]

    firsts = [texts[plan.decoding, plan.prompt][0] for plan in stepping.values()]
    return dict(zip(stepping, walk(list(stepping), firsts, ask), strict=True))


def check(host: Host, cases: Iterable[Case], options: AskOptions = DEFAULT_ASK) -> None:
    """Raise RequestError naming every case with a probe that the host cannot be asked, before anything runs.

    Options as of :func:`observe`: formatted prompts count, answers behind them, in the model's window.
    """
    prompt_settings = _make_prompt_settings(host, options)
    complaints = []
    for case in cases:
        for probe in case.probes:
            try:
                host.see([probe])
                complaint = _too_long(host, prompt_settings.plan(probe))
            except RequestError as error:
                complaint = str(error)
            if complaint is not None:
                complaints.append(f"case {case.id}, {probe.kind} probe {probe.prompt!r:.60}: {complaint}")
                break
    if complaints:
        more = f"\nand {len(complaints) - MOST_CASES} more cases" if len(complaints) > MOST_CASES else ""
        raise RequestError("\n".join(complaints[:MOST_CASES]) + more)


def _make_prompt_settings(host: Host, options: AskOptions) -> _PromptSettings:
    thinking.check(host, options)
    prompt_format = prompts.prompt_format(host.prompt_format, options)
    if thinking.mode_of(options) == "forced" and options.thinking_template is None:
        prompt_format = _with_thoughts(host, prompt_format)
    plain = prompts.PromptFormat(join=prompt_format.join)
    return _PromptSettings(host.with_prompt_format(prompt_format), host.with_prompt_format(plain), options)


def _with_thoughts(host: Host, settings: prompts.PromptFormat) -> prompts.PromptFormat:
    """Turn thinking on. A template that always opens a block stays as it is; raises ConfigError where none does."""
    on = replace(settings, thinking=True)
    try:
        host.with_prompt_format(on).frame("?")
    except ConfigError:
        if not host.with_prompt_format(settings).frame("?").open_block:
            raise
        return settings
    return on


def _too_long(host: Host, plan: _Plan) -> str | None:
    """Return why a probe does not fit the window, None if it does; an answer's last token need not be run."""
    if host.window is None:
        return None
    answers = [a for a in (plan.answer, plan.rival, *plan.choices) if a is not None]
    prompt = max((host.length(row) for row in (plan.prompt, plan.base) if row), default=0)
    longest = max(prompt, *(host.length(answer.ids) for answer in answers), 0)
    if longest <= host.window:
        return None
    what = "prompt" if prompt > host.window else "prompt and answer"
    return f"{what} are {longest} tokens, the model's window is {host.window}; shorten it or omit the case"


def _run(
    host: Host,
    plans: Sequence[_Plan],
    after: _PrefixScorer,
    seed: int,
    on_progress: OnCount,
) -> dict[tuple[_Decoding, Ids], tuple[str, str]]:
    """Run all prompts, score the answers after them, and return the generated text for each, with its thoughts."""
    from errata.host.decoding import run_prefixes

    ways: dict[_Decoding | None, dict[Ids, None]] = {}
    for plan in plans:
        if plan.decoding is not None:
            ways.setdefault(plan.decoding, {})[plan.prompt] = None
    continued = {row for rows in ways.values() for row in rows}
    ways[None] = {base: None for base in after.bases if base not in continued}
    after.share(continued | set(ways[None]))
    texts: dict[tuple[_Decoding, Ids], tuple[str, str]] = {}
    completed, total = 0, sum(map(len, ways.values()))
    for decoding, rows in ways.items():
        for group in _groups(list(rows), decoding):
            prefixes = run_prefixes(host, group)
            after.read(prefixes)
            if decoding is not None:
                answers = zip(group, _decode(host, prefixes, decoding, seed), strict=True)
                texts.update(((decoding, row), text) for row, text in answers)
            completed += len(group)
            on_progress(completed, total)
    after.finish()
    return texts


def _decode(host: Host, prefixes: Prefixes, decoding: _Decoding, seed: int) -> list[tuple[str, str]]:
    if decoding.sample:
        return [(text, "") for text in draw_rows(host, prefixes, decoding.limit, top_k=OPEN_TOP_K, seed=seed)]
    texts = generate_rows(host, prefixes, decoding.limit, decoding.stop)
    return [
        (prompts.answer_of(text, decoding.block), prompts.thoughts_of(text, decoding.block)) for text in texts
    ]


def _groups(rows: Sequence[Ids], decoding: _Decoding | None) -> Iterator[list[Ids]]:
    """Batch rows, with room for their new tokens."""
    more = 0 if decoding is None or decoding.sample else decoding.limit
    minimum = decoding.limit if decoding is not None and decoding.sample else 0
    for group in tokens.by_length([range(max(len(row) + more, minimum)) for row in rows], GENERATE_TOKENS):
        yield [rows[i] for i in group]


@dataclass(frozen=True)
class _Suffix:
    """The part of an answer that is still to be run: the tokens after its first ``offset`` ones."""

    root: int
    """Index of the cached prefix that it continues."""
    offset: int
    answer: tokens.Answer

    @property
    def row(self) -> Ids:
        """The root's index and the tokens to run: all but the last, as nothing after it is scored."""
        return (self.root, *self.answer.ids[self.offset : -1])


class _PrefixScorer:
    """Scores answers after prompts that are run anyway, so that each prefix is run once.

    A causal model's output at a position does not depend on later tokens. So answers are scored after prompts that
    were already run, and an answer that is a prefix of another is read from the other's row.
    """

    def __init__(self, host: Host, budget: int) -> None:
        self.host, self.budget = host, budget
        self.spread: dict[Ids, Tensor] = {}
        """By token ids, the log-probabilities of the next token, float32 ``[vocab]`` on the CPU."""
        self.bases: dict[Ids, None] = {}
        """Prefixes with something to score after them."""
        self._distributions: set[Ids] = set()
        self._after_prefix: dict[Ids, list[tokens.Answer]] = {}
        self._without_prefix: list[tokens.Answer] = []
        self._answers: dict[tokens.Answer, None] = {}
        self._scores: dict[tokens.Answer, list[tuple[float, bool]]] = {}

    def ask(self, plan: _Plan) -> None:
        """Register the answers of a plan, and its next-token distribution if that is recorded."""
        answers = [a for a in (plan.answer, plan.rival, *plan.choices) if a is not None]
        self._answers.update(dict.fromkeys(answers))
        if plan.spread:
            self._distributions.add(plan.base)
        if plan.spread or answers:
            self.bases[plan.base] = None

    def share(self, roots: set[Ids]) -> None:
        """Set the prefixes that will be run: each answer is scored after the longest one that it begins with."""
        lengths = sorted({len(root) for root in roots}, reverse=True)
        self._after_prefix = {root: [] for root in roots}
        shareable = self.host.shareable
        for answer in self._answers:
            begins = (answer.ids[:length] for length in lengths if length <= answer.start)
            root = next((text for text in begins if text in roots), None)
            alone = root is None or (not self.host.continues_rows([root]) and len(root) < len(answer.ids) - 1)
            if root is not None and not shareable and len(root) != answer.start:
                alone = True  # a router decided at the end of another prompt
            (self._without_prefix if root is None or alone else self._after_prefix[root]).append(answer)

    def of(self, answer: tokens.Answer | None) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        """Return each answer token's log-probability in nats, and whether it is the argmax; empty for None."""
        scores = [] if answer is None else self._scores[answer]
        return tuple(logprob for logprob, _ in scores), tuple(first for _, first in scores)

    def read(self, prefixes: Prefixes) -> None:
        """Score everything after a batch of prefixes that have been run."""
        from errata.host.decoding import logits_after

        suffixes: list[_Suffix] = []
        for i, root in enumerate(prefixes):
            if root in self._distributions:
                self.spread[root] = prefixes.logits[i].float().log_softmax(-1).cpu()
            suffixes += [_Suffix(i, len(root), answer) for answer in self._after_prefix.pop(root, ())]
        first = [
            (suffix.root, suffix.answer, 0) for suffix in suffixes if suffix.offset == suffix.answer.start
        ]
        self._store(prefixes.logits, first)
        self._run(suffixes, lambda rows, at: logits_after(self.host, prefixes, rows, at))

    def finish(self) -> None:
        """Run the answers that begin with none of the prefixes."""
        for start, answers in _by_prompt(self._without_prefix, shareable=self.host.shareable).items():

            def run(rows: Sequence[tuple[int, Ids]], at: tuple[Tensor, Tensor], start: int = start) -> Tensor:
                ends = None if self.host.shareable else torch.full((len(rows),), start - 1)
                return self.host.forward_at(self.host.batch([row for _, row in rows]), *at, ends=ends)

            self._run([_Suffix(0, 0, answer) for answer in answers], run)
        self._without_prefix = []

    def _run(
        self,
        suffixes: Sequence[_Suffix],
        run: Callable[[Sequence[tuple[int, Ids]], tuple[Tensor, Tensor]], Tensor],
    ) -> None:
        """Run suffixes in batches of bounded size, without those that are prefixes of another."""
        suffixes_of = _rows_to_run([suffix for suffix in suffixes if len(suffix.row) > 1])
        for rows in self._batches(suffixes_of):
            places: dict[tuple[int, int], int] = {}
            reads = []
            for line, row in enumerate(rows):
                for suffix in suffixes_of[row]:
                    before = suffix.answer.start - 1 - suffix.offset  # column before the answer's first token
                    for k in range(int(before < 0), len(suffix.answer.target)):
                        place = places.setdefault((line, before + k), len(places))
                        reads.append((place, suffix.answer, k))
            at = torch.tensor(list(places)).unbind(1)
            with torch.no_grad():
                self._store(run([(row[0], row[1:]) for row in rows], (at[0], at[1])), reads)

    def _batches(self, suffixes_of: dict[Ids, list[_Suffix]]) -> Iterator[list[Ids]]:
        """Batch rows, longest first, with at most ``budget`` tokens (cached ones included) and ``LOGITS`` logits."""
        room = max(1, LOGITS // self.host.vocab_size)
        length_of = {
            row: max(len(suffix.answer.ids) for suffix in suffixes) for row, suffixes in suffixes_of.items()
        }
        pack: list[Ids] = []
        read = 0
        for row in sorted(suffixes_of, key=lambda row: -length_of[row]):
            more = sum(len(suffix.answer.target) for suffix in suffixes_of[row])
            if pack and ((len(pack) + 1) * length_of[pack[0]] > self.budget or read + more > room):
                yield pack
                pack, read = [], 0
            pack.append(row)
            read += more
        if pack:
            yield pack

    def _store(self, logits: Tensor, reads: Sequence[tuple[int, tokens.Answer, int]]) -> None:
        """Store the log-probabilities of answer tokens; ``reads``: (row of the logits, answer, index of the token)."""
        if not reads:
            return
        wide = logits.float()
        row = torch.tensor([place for place, _, _ in reads], device=wide.device)
        token = torch.tensor([answer.target[k] for _, answer, k in reads], device=wide.device)
        logprob = wide[row, token] - wide.logsumexp(-1)[row]
        first = wide.argmax(-1)[row] == token
        for (_, answer, k), value in zip(
            reads, zip(logprob.tolist(), first.tolist(), strict=True), strict=True
        ):
            scores = self._scores.setdefault(answer, [(0.0, False)] * len(answer.target))
            scores[k] = value


def _by_prompt(answers: Sequence[tokens.Answer], *, shareable: bool) -> dict[int, list[tokens.Answer]]:
    """Group answers that may share rows: all of them, or those with prompts of equal length."""
    if shareable:
        return {0: list(answers)} if answers else {}
    groups: dict[int, list[tokens.Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.start, []).append(answer)
    return groups


def _rows_to_run(suffixes: Iterable[_Suffix]) -> dict[Ids, list[_Suffix]]:
    """Return the rows that are not a prefix of another, each with the suffixes to score on it.

    In sorted order, the rows that extend a row follow it immediately.
    """
    rows: dict[Ids, list[_Suffix]] = {}
    longest: Ids = ()
    for row, suffix in sorted(
        ((suffix.row, suffix) for suffix in suffixes), key=lambda pair: pair[0], reverse=True
    ):
        if longest[: len(row)] != row:
            longest = row
        rows.setdefault(longest, []).append(suffix)
    return rows


def logprobs(host: Host, texts: Sequence[str], *, batch_tokens: int = SCORE_TOKENS) -> list[Tensor]:
    """Return each text's log-probabilities per token given the tokens before it, in nats.

    float32 ``[tokens - 1]`` on the CPU, in the order of the texts. The first token, the begin token if the tokenizer
    adds one, is not scored; texts are truncated to the window and to ``TEXT_TOKENS``; a text of fewer than two
    tokens has none. Raises HostError for an encoder-decoder.
    """
    limit = min(TEXT_TOKENS, host.window or TEXT_TOKENS)
    rows = [host.encode(text).ids[:limit] for text in texts]
    scored_rows = [i for i, row in enumerate(rows) if len(row) > 1]
    budget = max(limit, min(batch_tokens, LOGITS // host.vocab_size))
    texts_logprobs = [torch.empty(0)] * len(rows)
    for places in tokens.by_length([rows[i] for i in scored_rows], budget):
        group = [scored_rows[place] for place in places]
        batch = host.batch([rows[i] for i in group])
        with torch.no_grad():
            spread = host.forward(batch).float().log_softmax(-1)
        target_logprobs = spread[:, :-1].gather(-1, batch.ids[:, 1:, None])[..., 0].cpu()
        for line, i in enumerate(group):
            texts_logprobs[i] = target_logprobs[line, : len(rows[i]) - 1]
    return texts_logprobs


def text_routes(host: Host, texts: Sequence[str]) -> list[Routes]:
    """Return each text's experts by layer and token, as far as :func:`logprobs` scores it; empty without experts."""
    if not mixtures(host.model):
        return []
    limit = min(TEXT_TOKENS, host.window or TEXT_TOKENS)
    return routed(host, [host.encode(text).ids[:limit] for text in texts])


def unique(probes: Iterable[Probe]) -> list[Probe]:
    """Remove duplicates, keeping the order."""
    return list(dict.fromkeys(probes))
