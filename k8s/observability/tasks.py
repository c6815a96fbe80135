"""Tasks: what becomes of them, how long they take, and what they fail with."""

from k8s.observability.panels import (
    QUEUE,
    QUEUE_TASK,
    QUEUE_VARIABLE,
    TASK,
    TASK_VARIABLE,
    Page,
    Panel,
    Query,
    Row,
    increase,
    most,
    quantile,
    quantiles,
    rate,
    share,
)

ATTEMPTS = "taskqueue_task_attempts_total"
FINISHED = "taskqueue_tasks_finished_total"
ENDED = 'outcome=~"lost|timed_out"'
BAD = 'outcome=~"failed|timed_out|lost"'

PAGE = Page(
    file="tasks",
    uid="taskqueue-tasks",
    title="Task queue / Tasks",
    says="What becomes of tasks and attempts, how long they take, and what they fail with.",
    variables=(QUEUE_VARIABLE, TASK_VARIABLE),
    rows=(
        Row(
            title="Outcomes",
            panels=(
                Panel(
                    title="Attempts by outcome",
                    kind="stacked",
                    unit="ops",
                    says="`retried` and `failed`: see what they raise below. `lost`: a process died, look for"
                    " OutOfMemory and at the nodes. `timed_out`: raise the limit, or find out what hangs."
                    " `released`: handed back by a worker that stopped, which is normal in a rollout.",
                    queries=(Query(expr=rate(ATTEMPTS, "outcome", QUEUE_TASK), legend="{{outcome}}"),),
                ),
                Panel(
                    title="Finished tasks by outcome",
                    kind="stacked",
                    unit="ops",
                    says="Each task once, when it has ended. `GET /api/tasks?status=FAILURE` finds those that failed,"
                    " `POST /api/tasks/{id}/rerun` runs one again.",
                    queries=(Query(expr=rate(FINISHED, "outcome", QUEUE_TASK), legend="{{outcome}}"),),
                ),
                Panel(
                    title="Share of tasks that fail",
                    unit="percentunit",
                    steps=((None, "green"), (0.05, "red")),
                    says="By task, of those that ended. Over 5 % there is an alert, TaskqueueTaskFailureRatioHigh:"
                    " see the exceptions, and whether it began with a rollout.",
                    queries=(
                        Query(
                            expr=share(
                                rate(FINISHED, "task", f"{QUEUE_TASK},{BAD}"), rate(FINISHED, "task", QUEUE_TASK)
                            ),
                            legend="{{task}}",
                        ),
                    ),
                ),
                Panel(
                    title="Share of attempts that are retried",
                    unit="percentunit",
                    steps=((None, "green"), (0.3, "red")),
                    says="By task. Over 30 % of a queue there is an alert, TaskqueueRetryStorm: what these tasks call"
                    " is probably down, and retries make it worse. `POST /api/queues/{name}/pause` gives it a rest.",
                    queries=(
                        Query(
                            expr=share(
                                rate(ATTEMPTS, "task", f'{QUEUE_TASK},outcome="retried"'),
                                rate(ATTEMPTS, "task", QUEUE_TASK),
                            ),
                            legend="{{task}}",
                        ),
                    ),
                ),
                Panel(
                    title="Lost and timed out",
                    unit="short",
                    says="Attempts in the time shown whose process died, or that ran into their limit, by task. One"
                    " that is lost again and again kills its process: look for its memory.",
                    queries=(
                        Query(
                            expr=f"sum by (task, outcome) (increase({ATTEMPTS}{{{QUEUE_TASK},{ENDED}}}"
                            "[$__rate_interval]))",
                            legend="{{task}} {{outcome}}",
                        ),
                    ),
                ),
                Panel(
                    title="Failed for good, and kept",
                    unit="short",
                    says="Tasks whose retries are spent, by queue, until their retention ends. Grows: see why, then"
                    " run them again, `POST /api/tasks/rerun` with a filter.",
                    queries=(Query(expr=most("taskqueue_dead_letter_tasks", "queue", QUEUE), legend="{{queue}}"),),
                ),
            ),
        ),
        Row(
            title="What they fail with",
            panels=(
                Panel(
                    title="Exceptions",
                    kind="table",
                    unit="short",
                    width=12,
                    says="The most frequent in the time shown, by class. `GET /api/tasks/{id}/attempts` has the"
                    " traceback and the last lines that were logged.",
                    columns=("task", "exception", "Attempts"),
                    queries=(
                        Query(
                            expr="sort_desc(topk(20, "
                            f"{increase('taskqueue_task_exceptions_total', 'task, exception', TASK)} > 0))"
                        ),
                    ),
                ),
                Panel(
                    title="Attempts",
                    kind="table",
                    unit="short",
                    width=12,
                    says="The most frequent in the time shown, by task and outcome. Much `retried` for few"
                    " `succeeded` is work in vain: see the exceptions beside.",
                    columns=("task", "queue", "outcome", "Attempts"),
                    queries=(
                        Query(
                            expr=f"sort_desc(topk(50, {increase(ATTEMPTS, 'task, queue, outcome', QUEUE_TASK)} > 0))"
                        ),
                    ),
                ),
            ),
        ),
        Row(
            title="How long they take",
            panels=(
                Panel(
                    title="Run",
                    unit="s",
                    says="How long the code of an attempt runs. Grows: look at what the task calls, and give it a"
                    " time limit.",
                    queries=quantiles("taskqueue_task_run_duration_seconds", QUEUE_TASK),
                ),
                Panel(
                    title="Run by task (p95)",
                    unit="s",
                    says="The slow ones fill slots for long: give them a queue and a pool of their own.",
                    queries=(
                        Query(
                            expr=quantile(0.95, "taskqueue_task_run_duration_seconds", "task", QUEUE_TASK),
                            legend="{{task}}",
                        ),
                    ),
                ),
                Panel(
                    title="From submit to end",
                    unit="s",
                    says="Waits, delays that were asked for and retries included. Much longer than wait and run: they"
                    " are retried.",
                    queries=quantiles("taskqueue_task_end_to_end_seconds", QUEUE_TASK),
                ),
                Panel(
                    title="Wait by task (p95)",
                    unit="s",
                    says="From when a task was due to when it began. One waits far longer than the others of its"
                    " queue: it comes in bursts.",
                    queries=(
                        Query(
                            expr=quantile(0.95, "taskqueue_task_queue_wait_seconds", "task", QUEUE_TASK),
                            legend="{{task}}",
                        ),
                    ),
                ),
                Panel(
                    title="Submits by outcome",
                    kind="stacked",
                    unit="ops",
                    says="`accepted` made a task. `replayed` and `deduplicated` were there already: clients repeat"
                    " themselves, which is what keys and `unique_for` are for.",
                    queries=(
                        Query(
                            expr=rate("taskqueue_tasks_submitted_total", "outcome", QUEUE_TASK), legend="{{outcome}}"
                        ),
                    ),
                ),
                Panel(
                    title="Size of the arguments (p95)",
                    unit="bytes",
                    says="By task. Grows: have the client put the data elsewhere, and submit a reference to it.",
                    queries=(
                        Query(expr=quantile(0.95, "taskqueue_submit_payload_bytes", "task", TASK), legend="{{task}}"),
                    ),
                ),
            ),
        ),
    ),
)
