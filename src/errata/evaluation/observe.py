"""Ask a host. The only place where evaluation runs a model; nothing is judged here.

Rows are sorted by length and padded in batches of bounded size, so a probe's answer does not depend
on its neighbours beyond rounding. What several probes ask alike is run once: a prompt is run once for
its continuation and for all answers that are scored behind it, and what follows a text is read off any
row that begins with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.host import prompts, tokens
from errata.host.load import Host, draw_rows, generate_rows
from errata.host.prompts import Template
from errata.types import Case, Form, Observation, Probe, kind_of
from errata.writing import Join

if TYPE_CHECKING:  # opens transformers
    from errata.host.decoding import Prefixes
    from errata.host.stopping import Stop

Ids = tuple[int, ...]

SCORE_TOKENS = 8192
GENERATE_TOKENS = 8192
MAX_NEW_TOKENS = 24
THOUGHT_TOKENS = 200
LONG_TOKENS = 512
OPEN_TOKENS = 100
"""Tokens of running text, the prompt's included (ROME's fluency, arXiv 2202.05262)."""
OPEN_TOP_K = 5

TEXT_TOKENS = 256
"""Tokens of a running text that are scored; the rest is left."""
LOGITS = 2**27
"""How many logits of running text are held at once: half a gigabyte in float32."""

SHOWN = 20
"""Most cases that one complaint names."""

SAID: frozenset[Form] = frozenset({"short", "long", "thought", "open"})
"""Forms that the host is to say something for; the others are scored alone."""


@dataclass(frozen=True)
class _Saying:
    """How prompts are continued; those of one way are continued together."""

    limit: int
    """New tokens; of a drawn text, all its tokens."""
    stop: Stop = "sentence"
    drawn: bool = False
    block: str = ""
    """A thinking block that the prompt leaves open: its first mark."""


@dataclass(frozen=True)
class _Plan:
    """What a probe asks of the host."""

    saying: _Saying | None
    prompt: Ids
    """What is continued."""
    base: Ids
    """What answers are scored behind, and after which the next token is looked at."""
    answer: tokens.Answer | None
    rival: tokens.Answer | None
    choices: tuple[tokens.Answer, ...]
    spread: bool
    """Whether the whole distribution of the next token is kept."""


@dataclass(frozen=True)
class _Manner:
    """How probes are put to a host: the settings of :func:`observe` that shape prompts and answers."""

    host: Host
    """The host with the prompt format that is asked for."""
    plain: Host
    """The same host, prompts as they stand."""
    context: str
    generate: bool
    short: int
    thought: int
    long: int

    def plan(self, probe: Probe) -> _Plan:
        """Tokenise what a probe asks."""
        text = f"{self.context.rstrip()}\n\n{probe.prompt}" if self.context.strip() else probe.prompt
        host = self.plain if self._uncued(probe.form) else self.host
        framed = host.frame(text)
        saying = self._saying(probe.form, framed)
        asked = probe.form != "open"
        scored = [
            self._answer(host, text, given, probe.form)
            for given in (*probe.answers[: int(asked)], *probe.choices)
        ]
        first = scored.pop(0) if asked and probe.answers else None
        slots = len(first.target) if first is not None else None  # a model that fills masks is told how many
        rival = (
            None if probe.rival is None or not asked else self._answer(host, text, probe.rival, probe.form)
        )
        return _Plan(
            saying, host.encode_framed(framed, slots=slots), host.encode_base(text), first, rival, tuple(scored),
            kind_of(probe.kind).distribution,
        )  # fmt: skip

    @property
    def _template(self) -> Template:
        """The template, ``auto`` settled."""
        wanted = self.host.prompt_format.template
        if wanted == "auto":
            return "chat" if tokens.has_chat(self.host.tokenizer) else "question"
        return wanted

    def _uncued(self, form: Form) -> bool:
        """Whether a form is put as it stands: running text always, choices and spans without an answer cue."""
        return form == "open" or (self._template == "question" and form in ("choice", "span"))

    def _saying(self, form: Form, framed: prompts.Framed) -> _Saying | None:
        if not self.generate or form not in SAID:
            return None
        if form == "open":
            return _Saying(OPEN_TOKENS, drawn=True)
        limit = {"short": self.short, "thought": self.thought, "long": self.long}[form]
        if not framed.special:
            thinks = framed.text != framed.scored
            return _Saying(limit + self.thought * int(thinks), "end", block=framed.open_block)
        if form == "short":
            return _Saying(limit, "sentence" if self._template == "raw" else "line")
        return _Saying(limit, "thought" if form == "thought" else "passage")

    def _answer(self, host: Host, prompt: str, answer: str, form: Form) -> tokens.Answer:
        """Tokenise an answer after its prompt, with at least one token before it; a long one cut to fit."""
        made = host.encode_answer(prompt, answer)
        if not made.start:
            begin = host.encode_base(prompt)
            made = tokens.Answer((*begin, *made.ids), len(begin))
        if form == "long" and host.window is not None and made.start < host.window:
            made = tokens.Answer(made.ids[: host.window], made.start)
        return made


def observe(
    host: Host,
    probes: Sequence[Probe],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    thought_tokens: int = THOUGHT_TOKENS,
    long_tokens: int = LONG_TOKENS,
    template: Template | None = None,
    system: str | None = None,
    thinking: bool | None = None,
    join: Join | None = None,
    context: str = "",
    generate: bool = True,
    seed: int = 0,
    batch_tokens: int = SCORE_TOKENS,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Observation]:
    """Return what the host says to each probe: text and log-probabilities, each as its form asks.

    Texts are greedy and end at their natural stop; those of form ``open`` are drawn among the five most
    probable tokens, each with a random state of its own made from ``seed``. ``max_new_tokens``,
    ``thought_tokens`` and ``long_tokens`` bound what is said to the forms short, thought and long.

    ``template``, ``system``, ``thinking``, ``join``: how prompts are put, see
    :class:`errata.host.prompts.PromptFormat`; those left out are the host's own. Raw prompts are continued as
    they stand; behind the cue of ``question`` a short answer ends at a line break; in a conversation the answer
    ends where the model ends it, and a model that may think first gets ``thought_tokens`` more. Log-probabilities
    stand behind the same text, with its thinking block closed. ``context``: an unrelated text put before every
    prompt.

    Raises ConfigError for a template that is not known or not there, RequestError for a prompt or answer that
    does not fit the window.
    """
    settings = prompts.prompt_format(
        host.prompt_format, template=template, system=system, thinking=thinking, join=join
    )
    manner = _manner(
        host, settings, context, generate, short=max_new_tokens, thought=thought_tokens, long=long_tokens
    )
    plans = [manner.plan(probe) for probe in probes]
    for probe, plan in zip(probes, plans, strict=True):
        if (complaint := _too_long(host, plan)) is not None:
            raise RequestError(f"{probe.kind} probe {probe.prompt!r:.80}: {complaint}")
    after = _After(host, batch_tokens)
    for plan in plans:
        after.ask(plan)
    texts = _run(host, plans, after, seed, on_progress)
    seen = []
    for plan in plans:
        said, top = after.of(plan.answer)
        text = "" if plan.saying is None else texts[plan.saying, plan.prompt]
        spread = after.spread[plan.base] if plan.spread else None
        against, choices = after.of(plan.rival)[0], tuple(after.of(c)[0] for c in plan.choices)
        seen.append(Observation(text, said, top, against, spread, choices))
    return seen


def check(
    host: Host,
    cases: Iterable[Case],
    *,
    template: Template | None = None,
    system: str | None = None,
    thinking: bool | None = None,
    join: Join | None = None,
    context: str = "",
    generate: bool = True,
    **_: object,
) -> None:
    """Raise RequestError naming every case with a probe that the host cannot be asked, before anything runs.

    Options as of :func:`observe`: prompts count as they are put, answers behind them, in the model's window.
    """
    settings = prompts.prompt_format(
        host.prompt_format, template=template, system=system, thinking=thinking, join=join
    )
    manner = _manner(host, settings, context, generate)
    complaints = []
    for case in cases:
        for probe in case.probes:
            try:
                complaint = _too_long(host, manner.plan(probe))
            except RequestError as error:
                complaint = str(error)
            if complaint is not None:
                complaints.append(f"case {case.id}, {probe.kind} probe {probe.prompt!r:.60}: {complaint}")
                break
    if complaints:
        more = f"\nand {len(complaints) - SHOWN} more cases" if len(complaints) > SHOWN else ""
        raise RequestError("\n".join(complaints[:SHOWN]) + more)


def _manner(
    host: Host, settings: prompts.PromptFormat, context: str, generate: bool, *, short: int = MAX_NEW_TOKENS,
    thought: int = THOUGHT_TOKENS, long: int = LONG_TOKENS,
) -> _Manner:  # fmt: skip
    plain = prompts.PromptFormat(join=settings.join)
    return _Manner(
        host.with_prompt_format(settings),
        host.with_prompt_format(plain),
        context,
        generate,
        short,
        thought,
        long,
    )


def _too_long(host: Host, plan: _Plan) -> str | None:
    """Say what of a probe does not fit the window; an answer's last token need not be run."""
    if host.window is None:
        return None
    answers = [a for a in (plan.answer, plan.rival, *plan.choices) if a is not None]
    longest = max(len(plan.prompt), len(plan.base), *(len(answer.ids) for answer in answers), 0)
    if longest <= host.window:
        return None
    what = "prompt" if max(len(plan.prompt), len(plan.base)) > host.window else "prompt and answer"
    return (
        f"{what} are {longest} tokens, the model's window is {host.window}; shorten it or leave the case out"
    )


def _run(
    host: Host, plans: Sequence[_Plan], after: _After, seed: int, on_progress: Callable[[int, int], None]
) -> dict[tuple[_Saying, Ids], str]:
    """Run all prompts, read off what is asked behind them, and return what was said to each."""
    from errata.host.decoding import run_prefixes

    ways: dict[_Saying | None, dict[Ids, None]] = {}
    for plan in plans:
        if plan.saying is not None:
            ways.setdefault(plan.saying, {})[plan.prompt] = None
    said = {row for rows in ways.values() for row in rows}
    ways[None] = {base: None for base in after.bases if base not in said}
    after.share(said | set(ways[None]))
    texts: dict[tuple[_Saying, Ids], str] = {}
    done, total = 0, sum(map(len, ways.values()))
    for saying, rows in ways.items():
        for group in _groups(list(rows), saying):
            prefixes = run_prefixes(host, group)
            after.read(prefixes)
            if saying is not None:
                answers = zip(group, _say(host, prefixes, saying, seed), strict=True)
                texts.update(((saying, row), text) for row, text in answers)
            done += len(group)
            on_progress(done, total)
    after.finish()
    return texts


def _say(host: Host, prefixes: Prefixes, saying: _Saying, seed: int) -> list[str]:
    if saying.drawn:
        return draw_rows(host, prefixes, saying.limit, top_k=OPEN_TOP_K, seed=seed)
    texts = generate_rows(host, prefixes, saying.limit, saying.stop)
    return [prompts.answer_of(text, saying.block) for text in texts]


def _groups(rows: Sequence[Ids], saying: _Saying | None) -> Iterator[list[Ids]]:
    """Group rows that are run together, with room for what they are to say."""
    more = 0 if saying is None or saying.drawn else saying.limit
    whole = saying.limit if saying is not None and saying.drawn else 0
    for group in tokens.by_length([range(max(len(row) + more, whole)) for row in rows], GENERATE_TOKENS):
        yield [rows[i] for i in group]


@dataclass(frozen=True)
class _Tail:
    """An answer's part that is still to be run: what stands behind its first ``offset`` tokens."""

    root: int
    """Which of the prefixes it continues."""
    offset: int
    answer: tokens.Answer

    @property
    def row(self) -> Ids:
        """The root's number and the tokens to run: all but the last, after which nothing is asked."""
        return (self.root, *self.answer.ids[self.offset : -1])


class _After:
    """What comes after texts: collects what is asked, reads it off what is run, holds what was found.

    A causal model says the same after a text whatever follows it in the row. So answers are scored behind
    prompts that were run already, and of several answers only those that no other one goes on from are run.
    """

    def __init__(self, host: Host, budget: int) -> None:
        self.host, self.budget = host, budget
        self.spread: dict[Ids, Tensor] = {}
        """By text, log-probabilities of the next token, float32 ``[vocab]`` on the CPU."""
        self.bases: dict[Ids, None] = {}
        """Texts that something is asked after."""
        self._whole: set[Ids] = set()
        self._behind: dict[Ids, list[tokens.Answer]] = {}
        self._loose: list[tokens.Answer] = []
        self._answers: dict[tokens.Answer, None] = {}
        self._found: dict[tokens.Answer, list[tuple[float, bool]]] = {}

    def ask(self, plan: _Plan) -> None:
        """Ask for each token of a plan's answers, and for the distribution after its text if that is kept."""
        asked = [a for a in (plan.answer, plan.rival, *plan.choices) if a is not None]
        self._answers.update(dict.fromkeys(asked))
        if plan.spread:
            self._whole.add(plan.base)
        if plan.spread or asked:
            self.bases[plan.base] = None

    def share(self, roots: set[Ids]) -> None:
        """Say which texts will be run: each answer is scored behind the longest of them it begins with."""
        lengths = sorted({len(root) for root in roots}, reverse=True)
        self._behind = {root: [] for root in roots}
        for answer in self._answers:
            begins = (answer.ids[:length] for length in lengths if length <= answer.start)
            root = next((text for text in begins if text in roots), None)
            alone = root is None or (not self.host.continues and len(root) < len(answer.ids) - 1)
            if root is not None and not self.host.shareable and len(root) != answer.start:
                alone = True  # a router decided at the end of another prompt
            (self._loose if root is None or alone else self._behind[root]).append(answer)

    def of(self, answer: tokens.Answer | None) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        """Return each answer token's log-probability in nats, and whether it came first; nothing for None."""
        found = [] if answer is None else self._found[answer]
        return tuple(logprob for logprob, _ in found), tuple(first for _, first in found)

    def read(self, prefixes: Prefixes) -> None:
        """Read off what is asked after some of the shared texts and behind them."""
        from errata.host.decoding import logits_after

        tails: list[_Tail] = []
        for i, root in enumerate(prefixes):
            if root in self._whole:
                self.spread[root] = prefixes.logits[i].float().log_softmax(-1).cpu()
            tails += [_Tail(i, len(root), answer) for answer in self._behind.pop(root, ())]
        first = [(tail.root, tail.answer, 0) for tail in tails if tail.offset == tail.answer.start]
        self._take(prefixes.logits, first)
        self._run(tails, lambda rows, at: logits_after(self.host, prefixes, rows, at))

    def finish(self) -> None:
        """Run the answers that no shared text begins."""
        for start, answers in _by_prompt(self._loose, shareable=self.host.shareable).items():

            def run(rows: Sequence[tuple[int, Ids]], at: tuple[Tensor, Tensor], start: int = start) -> Tensor:
                ends = None if self.host.shareable else torch.full((len(rows),), start - 1)
                return self.host.forward_at(self.host.batch([row for _, row in rows]), *at, ends=ends)

            self._run([_Tail(0, 0, answer) for answer in answers], run)
        self._loose = []

    def _run(
        self,
        tails: Sequence[_Tail],
        run: Callable[[Sequence[tuple[int, Ids]], tuple[Tensor, Tensor]], Tensor],
    ) -> None:
        """Run tails in bounded batches; of several, only those that no other one goes on from."""
        carried = _carried([tail for tail in tails if len(tail.row) > 1])
        for rows in self._packed(carried):
            places: dict[tuple[int, int], int] = {}
            reads = []
            for line, row in enumerate(rows):
                for tail in carried[row]:
                    before = tail.answer.start - 1 - tail.offset  # column before the answer's first token
                    for k in range(int(before < 0), len(tail.answer.target)):
                        place = places.setdefault((line, before + k), len(places))
                        reads.append((place, tail.answer, k))
            at = torch.tensor(list(places)).unbind(1)
            with torch.no_grad():
                self._take(run([(row[0], row[1:]) for row in rows], (at[0], at[1])), reads)

    def _packed(self, carried: dict[Ids, list[_Tail]]) -> Iterator[list[Ids]]:
        """Batch rows, longest first, bounded in tokens, also those run before, and in what is read."""
        room = max(1, LOGITS // self.host.vocab_size)
        whole = {row: max(len(tail.answer.ids) for tail in tails) for row, tails in carried.items()}
        pack: list[Ids] = []
        read = 0
        for row in sorted(carried, key=lambda row: -whole[row]):
            more = sum(len(tail.answer.target) for tail in carried[row])
            if pack and ((len(pack) + 1) * whole[pack[0]] > self.budget or read + more > room):
                yield pack
                pack, read = [], 0
            pack.append(row)
            read += more
        if pack:
            yield pack

    def _take(self, logits: Tensor, reads: Sequence[tuple[int, tokens.Answer, int]]) -> None:
        """Keep the log-probabilities of answers' tokens: (row of the logits, answer, which of its tokens)."""
        if not reads:
            return
        wide = logits.float()
        row = torch.tensor([place for place, _, _ in reads], device=wide.device)
        token = torch.tensor([answer.target[k] for _, answer, k in reads], device=wide.device)
        said = wide[row, token] - wide.logsumexp(-1)[row]
        first = wide.argmax(-1)[row] == token
        for (_, answer, k), value in zip(reads, zip(said.tolist(), first.tolist(), strict=True), strict=True):
            found = self._found.setdefault(answer, [(0.0, False)] * len(answer.target))
            found[k] = value


def _by_prompt(answers: Sequence[tokens.Answer], *, shareable: bool) -> dict[int, list[tokens.Answer]]:
    """Group answers that may be read off one row: all of them, or those whose prompts are of one length."""
    if shareable:
        return {0: list(answers)} if answers else {}
    groups: dict[int, list[tokens.Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.start, []).append(answer)
    return groups


def _carried(tails: Iterable[_Tail]) -> dict[Ids, list[_Tail]]:
    """Find the rows that begin no other one; with each, the tails that are read off it.

    In sorted order all that goes on from a row follows it at once.
    """
    carried: dict[Ids, list[_Tail]] = {}
    carrier: Ids = ()
    for row, tail in sorted(((tail.row, tail) for tail in tails), key=lambda pair: pair[0], reverse=True):
        if carrier[: len(row)] != row:
            carrier = row
        carried.setdefault(carrier, []).append(tail)
    return carried


def logprobs(host: Host, texts: Sequence[str], *, batch_tokens: int = SCORE_TOKENS) -> list[Tensor]:
    """Return each text's log-probabilities per token given what stands before, in nats.

    float32 ``[tokens - 1]`` on the CPU, in the order of the texts. The first token, which is the begin
    token where the tokenizer sets one, is given and not scored; texts are cut to the window and to
    ``TEXT_TOKENS``, and a text of fewer than two tokens gives none. Raises HostError for an encoder-decoder.
    """
    limit = min(TEXT_TOKENS, host.window or TEXT_TOKENS)
    rows = [host.encode(text).ids[:limit] for text in texts]
    wanted = [i for i, row in enumerate(rows) if len(row) > 1]
    budget = max(limit, min(batch_tokens, LOGITS // host.vocab_size))
    found = [torch.empty(0)] * len(rows)
    for places in tokens.by_length([rows[i] for i in wanted], budget):
        group = [wanted[place] for place in places]
        batch = host.batch([rows[i] for i in group])
        with torch.no_grad():
            spread = host.forward(batch).float().log_softmax(-1)
        said = spread[:, :-1].gather(-1, batch.ids[:, 1:, None])[..., 0].cpu()
        for line, i in enumerate(group):
            found[i] = said[line, : len(rows[i]) - 1]
    return found


def unique(probes: Iterable[Probe]) -> list[Probe]:
    """Drop repeats, keeping order."""
    return list(dict.fromkeys(probes))
