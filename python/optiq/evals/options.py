"""What an evaluation is asked for, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import UsageError
from .capability import BENCHMARKS

if TYPE_CHECKING:
    from typing_extensions import Unpack

TASKS = (*BENCHMARKS, "kl", "size")
ALL = "capability"  # every task; KL only where its reference is known


class EvalFields(TypedDict, total=False):
    """The options of `optiq.evaluate`; see `EvalOptions`."""

    tasks: str | Sequence[str]
    limit: int | None
    full: bool
    data: str | Path | None
    reference: str | None
    revision: str | None
    resume: bool
    restart: bool
    progress: bool


@dataclass(frozen=True)
class EvalOptions:
    """
    Attributes:
        tasks: Some of `TASKS`. `required`: were named one by one, so none may be left out.
        limit: Ask only the first so many items of each set: a quick look, in a folder of its own.
        full: Ask all items that a set has, not only the fixed sample.
        data: The folder with the questions; see `data.load`.
        reference: What the KL is to (default: the model that optiq made this one from).
        revision: Branch, tag or commit of a model on the hub.
        resume: Go on with what the folder holds; finished tasks are not run again.
        restart: Discard the records that the folder holds of these tasks.
    """

    tasks: tuple[str, ...] = TASKS
    required: bool = False
    limit: int | None = None
    full: bool = False
    data: Path | None = None
    reference: str | None = None
    revision: str | None = None
    resume: bool = False
    restart: bool = False
    progress: bool = True

    @classmethod
    def parse(cls, **fields: Unpack[EvalFields]) -> EvalOptions:
        """Check the options as a user gives them; UsageError names the fix.

        `tasks` is "capability" (all, the default), or one or more names of tasks.
        """
        given: dict[str, Any] = dict(fields)
        named, data = given.pop("tasks", ALL), given.pop("data", None)
        names = (named,) if isinstance(named, str) else tuple(dict.fromkeys(named))
        options = cls(
            tasks=TASKS if ALL in names else names,
            required=ALL not in names,
            data=None if data is None else Path(data).expanduser(),
            **given,
        )
        for task in options.tasks:
            if task not in TASKS:
                known = ", ".join((ALL, *TASKS))
                raise UsageError(f"no task is called {task!r}; use one of {known}")
        if options.limit is not None and options.limit < 1:
            raise UsageError(f"--limit {options.limit} asks nothing; give at least 1")
        if options.limit and options.full:
            raise UsageError("--full asks every item and --limit a few; give one of them")
        return options
