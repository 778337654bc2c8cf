"""Answers after a thinking block: with thinking on, off, or forced to end after so many tokens.

Source: budget forcing as in s1 (arXiv 2501.19393): thoughts that go on are cut, the block is closed, and an answer is
asked for. The block is that of the host's chat template, or of a given text for hosts without one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from errata.errors import ConfigError
from errata.host.host import Host
from errata.host.prompts import Framed, has_chat
from errata.types import AskOptions
from errata.writing import last_block, unclosed_block

Mode = Literal["on", "off", "forced"]
MODES = ("on", "off", "forced")
PROMPT = "{prompt}"
OPENING = "<think>"
FINAL = "Final answer:"
"""What asks for an answer behind thoughts that were cut."""


def mode_of(options: AskOptions) -> Mode | None:
    """Return how a host is to think; None: as its prompt format says. Raises ConfigError for unknown words."""
    thinking = options.thinking
    if isinstance(thinking, bool):
        return "on" if thinking else "off"
    for mode in MODES:
        if thinking == mode:
            return mode  # type: ignore[return-value]
    if thinking is not None:
        raise ConfigError(f"thinking must be on, off or forced, found {thinking!r:.40}")
    return None


def check(host: Host, options: AskOptions) -> None:
    """Raise ConfigError where a host cannot be asked to think as the options say, with the reason."""
    mode, template = mode_of(options), options.thinking_template
    if template is not None:
        if mode is None:
            raise ConfigError("thinking_template: say also whether thinking is on, off or forced")
        if PROMPT not in template or unclosed_block(template) is None:
            raise ConfigError(
                f"thinking_template: expected {PROMPT} and an open thinking block at its end, as "
                f"'{PROMPT}\\n{OPENING}\\n', found {template!r:.80}"
            )
    elif mode in ("on", "forced") and not has_chat(host.tokenizer):
        raise ConfigError(
            f"{host.name} has no thinking block: its tokenizer has no chat template; give a thinking_template, as "
            f"'{PROMPT}\\n{OPENING}\\n'"
        )
    if mode is not None and template is not None and host.fills:
        raise ConfigError(f"{host.name} fills places and cannot think before it answers; leave thinking out")


def written(options: AskOptions, prompt: str) -> str:
    """Put a prompt into the given template; its block is closed where thinking is off."""
    assert options.thinking_template is not None
    text = options.thinking_template.replace(PROMPT, prompt)
    return text + (unclosed_block(text) or "") if mode_of(options) == "off" else text


def opened(frame: Framed) -> Framed:
    """Return a prompt that leaves a thinking block open, opened behind it where the model would do so itself."""
    if frame.open_block:
        return frame
    return replace(frame, text=f"{frame.text}{last_block(frame.scored) or OPENING}\n")


def forced(frame: Framed, thoughts: str) -> Framed:
    """Return an opened prompt with the thoughts behind it, the block closed, and an answer asked for."""
    close = (unclosed_block(frame.text) or "").lstrip("\n")
    text = f"{frame.text}{thoughts.strip()}\n{close}{FINAL}"
    return replace(frame, text=text, scored=text, shift=0, lead=None)
