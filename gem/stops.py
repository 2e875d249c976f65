"""Ends of a command that are neither success nor an error of the user: the numbers fail, or a signal asks for it."""

from __future__ import annotations


class Diverged(RuntimeError):  # noqa: N818 - it names what happened to the run
    """The numbers of a run are no good any more: not finite, far from where they were, or nothing to learn from.

    The command ends with status 3. Running it again without a change ends the same way.

    Args:
        text: what happened, and at which step.
        rail: the guard rail that was hit (gem.rails); "" if the log shows it.
    """

    def __init__(self, text: str, rail: str = "finite") -> None:
        super().__init__(text)
        self.rail = rail


class RankEnded(RuntimeError):  # noqa: N818 - it names what happened to the run
    """Another rank ended by an error or a signal, or its process died (gem.together). The text names the rank and says why."""


class Terminated(BaseException):
    """A signal ended the work in order. Its text says what is kept and how to go on; `signum` is the signal."""

    def __init__(self, signum: int, text: str = "terminated") -> None:
        super().__init__(text)
        self.signum = signum
