"""Say messages in the reader's language: English in every program, Chinese where the command line is asked for it.

A message is a template with named fields, and the template is its key in the catalogue, as with gettext. `said` keeps
it beside the English text, so data, logs and exceptions stay English; `localized` translates what is shown.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

LANGUAGES = ("en", "zh")
VARIABLE = "ERNIE_ACCEL_LANG"
_language: ContextVar[str] = ContextVar("ernie_accel_language", default="en")


class Message(str):
    """An English text that knows its template and fields. As a string it is the English text and nothing else."""

    template: str | None = None
    fields: Mapping[str, object] = {}


def said(template: str, **fields: object) -> str:
    """Return a message in English, which `localized` can translate later; fields may be messages, too."""
    message = Message(template.format(**fields))
    message.template, message.fields = template, fields
    return message


def joined(texts: Iterable[str | None], between: str = "{first}; {second}") -> str:
    """Return texts as one message, two at a time by the template `between`; those that are empty or None are left out.

    Without a text that is not empty, it is "".
    """
    whole = ""
    for text in filter(None, texts):
        whole = said(between, first=whole, second=text) if whole else text
    return whole


def listed(texts: Iterable[str]) -> str:
    """Return texts as one message with "and" before the last."""
    return _enumerated(texts, "{first} and {second}")


def one_of(texts: Iterable[str]) -> str:
    """Return texts as one message with "or" before the last."""
    return _enumerated(texts, "{first} or {second}")


def _enumerated(texts: Iterable[str], last: str) -> str:
    *others, end = [*texts] or [""]
    return joined((joined(others, "{first}, {second}"), end), last)


def localized(text: str) -> str:
    """Return a text in the reader's language; one that is no message, or has no translation, stays as it is."""
    if _language.get() == "en" or not isinstance(text, Message) or text.template is None:
        return text
    from ernie_accel.common.chinese import CATALOGUE

    fields = {name: localized(value) if isinstance(value, str) else value for name, value in text.fields.items()}
    return CATALOGUE.get(text.template, text.template).format(**fields)


def say(template: str, **fields: object) -> str:
    """Return a message in the reader's language."""
    return localized(said(template, **fields))


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """Speak a language within a with-block, or until `speak` changes it; afterwards the one before."""
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def speak(language: str) -> None:
    """Speak a language from now on in this context."""
    _language.set(language)


def language_asked_for(environment: Mapping[str, str] = os.environ) -> str:
    """Return the language that the environment asks for: by `ERNIE_ACCEL_LANG`, as it is written, else by the locale.

    A locale other than Chinese means English. Of the locale's variables the first that is set counts, as POSIX says.
    """
    if asked := environment.get(VARIABLE):
        return asked
    locale = next(filter(None, map(environment.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.replace("-", "_").partition(".")[0].partition("_")[0].lower() == "zh" else "en"
