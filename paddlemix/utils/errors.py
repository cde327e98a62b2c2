"""Errors that a user can fix. A script shows them as one line, without a traceback (see cli.run)."""

from __future__ import annotations

import re
from typing import Iterable, Tuple


class UserError(Exception):
    """Something in the command, the configuration or the input must be changed; the message says what.

    about: what it concerns, independent of the wording: keys of a configuration, or short codes such as "other-model".
    By default the command-line options that the message names.
    """

    exit_code = 2

    def __init__(self, message: str = "", *about: str):
        super().__init__(message)
        self.about: Tuple[str, ...] = about or tuple(re.findall(r"--(\w+)", message))

    @classmethod
    def of(cls, problems: Iterable[str]) -> UserError:
        """One error for several problems; each may be a Problem."""
        problems = list(problems)
        names = (name for problem in problems for name in getattr(problem, "about", ()))
        return cls("; ".join(problems), *dict.fromkeys(names))


class Problem(str):
    """A message that becomes part of an error, with what it is about (see UserError)."""

    about: Tuple[str, ...]

    def __new__(cls, text: str, *about: str) -> Problem:
        problem = super().__new__(cls, text)
        problem.about = about
        return problem

    @classmethod
    def of(cls, error: UserError, where: str = "") -> Problem:
        """The problem behind an error, with `where` as a prefix."""
        return cls(f"{where}{error}", *error.about)


class JobFailed(UserError):
    """The request was valid, but the job could not be completed."""

    exit_code = 1


class ConfigError(UserError):
    """A key or value of a configuration is unknown, has the wrong type, or cannot work here."""


class WeightsError(UserError):
    """A weights file or folder is broken, incomplete, or does not fit the model."""


class ImageTagError(UserError, ValueError):
    """`<img>` and `</img>` in a text are unpaired, nested, or have invalid contents."""


class ImageError(UserError):
    """An image cannot be used.

    `reason` is one of a fixed set (see processors.images), so that rows can be counted by it.
    """

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or reason, reason)
        self.reason = reason

    def __reduce__(self):
        # For pickling between loader workers and the parent.
        return type(self), (self.reason, str(self))
