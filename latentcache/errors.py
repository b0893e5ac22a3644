"""Errors that a user can act on: the value found, what was expected, and the remedy."""

from __future__ import annotations


class CtpipeError(Exception):
    """Base of every error that ctpipe raises on purpose. The command line prints it without a traceback."""


class InputError(CtpipeError, ValueError):
    """A user's input is unusable.

    Args:
        found: What was found; never patient data.
        expected: What would have been accepted.
        remedy: What the user can do about it.
    """

    def __init__(self, found: str, *, expected: str, remedy: str) -> None:
        super().__init__(f"{found}; expected {expected}. {remedy}")
        self.found = found
        self.expected = expected
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.found, self.expected, self.remedy))


def _rebuild(kind: type[InputError], found: str, expected: str, remedy: str) -> InputError:
    return kind(found, expected=expected, remedy=remedy)


class StoreError(InputError):
    """The latent store cannot be used as asked: newer format, another secret, a lease held, a half copy."""


class StoreExistsError(StoreError):
    """There is a store already where one was to be made."""


class CorruptLatentError(InputError):
    """Bytes of a committed latent do not match their checksum. Names the series key."""


class NonFiniteError(InputError):
    """A tensor holds NaN or infinity. Names the step, the series key and the tensor."""


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """Return the error for a package that is not installed, with the extra of ctpipe that brings it."""
    return InputError(
        f"the package {package} is not installed",
        expected=f"{package}, for {purpose}",
        remedy=f"Install it: pip install 'ctpipe[{extra}]'.",
    )


def no_ray_cluster() -> InputError:
    """Return the error of training and every other stage where nothing answers at a Ray address."""
    return InputError(
        "no Ray cluster answers at that address",
        expected="a running head node, and its token where it asks for one",
        remedy="Start one: ray start --head. If it runs with token authentication, set RAY_AUTH_MODE=token and "
        "give its token as Ray finds it (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token).",
    )
