"""Errors a user can mend. A script shows them as one line, without a traceback (see cli.run)."""

from __future__ import annotations


class UserError(Exception):
    """Something in the command, the configuration or the input must be changed; the message says what."""

    exit_code = 2


class JobFailed(UserError):
    """The request was fine, but the job could not be wholly done."""

    exit_code = 1


class ConfigError(UserError):
    """A key or value of a configuration is unknown, of the wrong kind, or cannot work here."""


class WeightsError(UserError):
    """A weights file or folder is broken, incomplete, or not what the model needs."""


class ImageTagError(UserError, ValueError):
    """`<img>` and `</img>` in a text do not pair up, nest, or hold what they may not."""


class ImageError(UserError):
    """An image cannot be used.

    `reason` is one short word group from a fixed set (see processors.images), so that rows can be counted by it.
    """

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or reason)
        self.reason = reason

    def __reduce__(self):
        # Loader workers hand errors to the parent by pickle, which would otherwise lose `reason`.
        return type(self), (self.reason, str(self))
