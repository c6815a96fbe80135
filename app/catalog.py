"""The tasks that may be submitted: name → function, parameter schema, retry policy, limits, queue.

A task is a typed Python function under a stable name:

    from app.catalog import task

    @task("reports.render", queue="reports", max_retries=5, autoretry_for=(OSError,), retry_backoff=True)
    def render(month: str, pages: int = 1) -> str: ...

The signature is the schema: arguments are checked against it before anything is
written, and turned into its types before the function runs. What `@task` returns
is a real Celery task.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from app.core import errors, limits
from app.core.config import QUEUE_NAME, TASK_NAME, Settings
from app.parameters import Parameters
from app.worker import execution, submission

BUILT_IN_MODULE = "app.worker.tasks"
SAMPLE_MODULE = "app.worker.sample_tasks"

TaskCancelled = execution.TaskCancelled
"""Raised in a task's code when its cancel was asked for: clean up, and let it pass."""

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class DurableFunction(Protocol, Generic[P, R_co]):
    """What `@task` makes of a function: still callable, and a Celery task."""

    name: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Run it here and now, without a queue."""
        ...

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Submit it; returns Celery's `AsyncResult`."""
        ...

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Submit it with options such as `countdown`; returns Celery's `AsyncResult`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a task runs again by itself.

    Attributes:
        exceptions: names of those after which it does.
        backoff_seconds: the wait before the first retry, doubled before each next one; None for Celery's 180 each.
        backoff_most_seconds: the longest such wait.
        jitter: each wait is drawn from zero to its value.
    """

    exceptions: tuple[str, ...]
    backoff_seconds: float | None
    backoff_most_seconds: float
    jitter: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A task that may be submitted.

    Attributes:
        name: stable; it outlives renames of the function.
        function: as it was written.
        queue: where it waits unless the submit says otherwise; None for the first of TASKQUEUE_QUEUES.
        max_retries: runs after a failed first one, unless the submit says otherwise.
        time_limit: seconds that one attempt may take; None for any.
        soft_time_limit: seconds after which it is told to come to an end; None for never.
        description: the first paragraph of the function's docstring.
        parameters: what it accepts.
        retry: when it runs again by itself.
    """

    name: str
    function: Callable[..., Any]
    queue: str | None
    max_retries: int
    time_limit: float | None
    soft_time_limit: float | None
    description: str
    parameters: Parameters
    retry: RetryPolicy

    def validate_call(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Check arguments as they came in JSON: no number for a text, no text for a number.

        Raises:
            ValidationFailed: with pointers such as `/args/0` and `/kwargs/x`, and no values.
        """
        self.parameters.validate(args, kwargs)

    def bind(self, args: str, kwargs: str) -> dict[str, Any]:
        """The arguments of a stored task, in the types of the signature.

        What was not given is left out, so that the function's own defaults hold.

        Args:
            args: a JSON array, as text.
            kwargs: a JSON object, as text.

        Raises:
            ValidationFailed: if they don't fit this release's signature.
        """
        return self.parameters.bind(args, kwargs)

    def named(self, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments that were checked, all of them by name: however a call is written, it looks the same."""
        return self.parameters.named(args, kwargs)

    def parameters_schema(self) -> dict[str, Any]:
        """The JSON Schema (2020-12) of the parameters, as an object by name."""
        return self.parameters.schema()


_registry: dict[str, Entry] = {}


class TaskDecorator:
    """`@task(…)`, and what a running task may say about itself."""

    def __call__(
        self,
        name: str,
        *,
        queue: str | None = None,
        max_retries: int = 3,
        autoretry_for: tuple[type[Exception], ...] = (),
        retry_backoff: bool | int = False,
        retry_backoff_max: int = 600,
        retry_jitter: bool = True,
        time_limit: float | None = None,
        soft_time_limit: float | None = None,
    ) -> Callable[[Callable[P, R]], DurableFunction[P, R]]:
        """Register a function as a task.

        Args:
            name: 1 to 255 letters, digits and `_ . - :`, not beginning with `celery.`; what clients submit.
            queue: where it waits; the first of TASKQUEUE_QUEUES unless given.
            max_retries: runs after a failed first one, 0 to 100.
            autoretry_for: exceptions after which it runs again. All others end it.
            retry_backoff: wait 1, 2, 4, … seconds before retries; a number is the first wait in seconds.
            retry_backoff_max: the longest such wait, in seconds.
            retry_jitter: draw each wait from zero to its value ("full jitter").
            time_limit: seconds after which one attempt is killed.
            soft_time_limit: seconds after which `celery.exceptions.SoftTimeLimitExceeded` is raised in the
                task's own code, once an attempt. Never comes first where a submit's own `time_limit` is shorter.

        Raises:
            TaskDeclarationError: if an option, the name or the signature can't be used, or the name is taken.
        """
        _check_options(name, queue, max_retries)
        _check_limits(name, time_limit, soft_time_limit)

        def register(function: Callable[P, R]) -> DurableFunction[P, R]:
            entry = Entry(
                name=name,
                function=function,
                queue=queue,
                max_retries=max_retries,
                time_limit=time_limit,
                soft_time_limit=soft_time_limit,
                description=_first_paragraph(function),
                parameters=Parameters(name, function),
                retry=RetryPolicy(
                    exceptions=tuple(kind.__name__ for kind in autoretry_for),
                    backoff_seconds=float(retry_backoff) if retry_backoff else None,
                    backoff_most_seconds=float(retry_backoff_max),
                    jitter=retry_jitter,
                ),
            )
            _add(entry)
            made = submission.celery.task(
                name=name,
                base=execution.DurableTask,
                shared=False,
                entry=entry,
                max_retries=max_retries,
                autoretry_for=autoretry_for,
                retry_backoff=retry_backoff,
                retry_backoff_max=retry_backoff_max,
                # Celery computes the cap and calls `retry`; the jitter under it is ours (`DurableTask.retry`).
                retry_jitter=False,
                retry_kwargs={"automatic": True},
                full_jitter=retry_jitter,
            )(function)
            return cast(DurableFunction[P, R], made)

        return register

    def checkpoint(self) -> None:
        """Stop here if the cancel of the running task was asked for.

        Raises:
            TaskCancelled: if it was.
        """
        execution.checkpoint()

    def progress(self, fraction: float, message: str | None = None) -> None:
        """Show how far the running task is.

        Args:
            fraction: from 0 to 1.
            message: a few words for people.

        Raises:
            TaskCancelled: if the task's cancel was asked for.
        """
        execution.progress(fraction, message)


task = TaskDecorator()


def lookup(name: str) -> Entry:
    """The task of this name.

    Raises:
        ValidationFailed: if none is registered; it points to `/task`.
    """
    try:
        return _registry[name]
    except KeyError:
        fault = errors.FieldError("/task", "No task of this name is registered")
        raise errors.ValidationFailed([fault]) from None


def find(name: str) -> Entry | None:
    """The task of this name, if there is one."""
    return _registry.get(name)


def entries() -> tuple[Entry, ...]:
    """Every registered task, by name."""
    return tuple(_registry[name] for name in sorted(_registry))


def load_modules(settings: Settings) -> None:
    """Import whatever registers tasks: the built-in ones, the samples if wanted, the operator's own.

    Raises:
        SettingsError: if one of `TASKQUEUE_TASK_MODULES` can't be imported.
    """
    importlib.import_module(BUILT_IN_MODULE)
    if settings.sample_tasks:
        importlib.import_module(SAMPLE_MODULE)
    if settings.task_modules and not {"", os.getcwd()} & set(sys.path):  # noqa: PTH109  # sys.path holds texts
        # As Celery's own command does it; last, so that nothing installed is hidden.
        sys.path.append(os.getcwd())  # noqa: PTH109  # as above
    for module in settings.task_modules:
        try:
            importlib.import_module(module)
        except Exception as failed:
            raise errors.SettingsError(_import_failure(module, failed)) from failed


def _import_failure(module: str, failed: Exception) -> str:
    reason = " ".join(str(failed).split()) or "no reason given"
    return f"TASKQUEUE_TASK_MODULES is wrong: {module} can't be imported ({type(failed).__name__}: {reason})"


def _add(entry: Entry) -> None:
    known = _registry.get(entry.name)
    if known is not None and _origin(known.function) != _origin(entry.function):
        taken = ".".join(_origin(known.function))
        raise errors.TaskDeclarationError(f"Task {entry.name}: the name is taken by {taken}")
    _registry[entry.name] = entry


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return str(function.__module__), str(getattr(function, "__qualname__", ""))


def _first_paragraph(function: Callable[..., Any]) -> str:
    paragraph = (function.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(paragraph.split())


def _check_options(name: str, queue: str | None, max_retries: int) -> None:
    for fault in _option_faults(name, queue, max_retries):
        raise errors.TaskDeclarationError(f"Task {name[:255]}: {fault}")


def _option_faults(name: str, queue: str | None, max_retries: int) -> Iterable[str]:
    if not TASK_NAME.fullmatch(name):
        yield "the name must be 1 to 255 letters, digits and _ . - :, and not begin with celery."
    if queue is not None and not QUEUE_NAME.fullmatch(queue):
        yield "the queue must be 1 to 64 letters, digits and _ . : -"
    if not 0 <= max_retries <= limits.MAX_RETRIES:
        yield f"max_retries must be 0 to {limits.MAX_RETRIES}"


def _check_limits(name: str, time_limit: float | None, soft_time_limit: float | None) -> None:
    for field, seconds in (("time_limit", time_limit), ("soft_time_limit", soft_time_limit)):
        if seconds is not None and not seconds > 0:
            raise errors.TaskDeclarationError(f"Task {name}: {field} must be more than 0 seconds")
    if time_limit is not None and soft_time_limit is not None and soft_time_limit >= time_limit:
        raise errors.TaskDeclarationError(f"Task {name}: soft_time_limit must be below time_limit")
