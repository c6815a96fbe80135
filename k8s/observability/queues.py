"""Queues and workers: what waits, for how long, and who takes it."""

from k8s.observability.panels import (
    NAMESPACE,
    QUEUE,
    QUEUE_VARIABLE,
    Page,
    Panel,
    Query,
    Row,
    most,
    quantile,
    quantiles,
    rate,
    total,
)

WAIT = "taskqueue_task_queue_wait_seconds"
LAST_READ = "taskqueue_state_exporter_last_success_timestamp_seconds"
INTERVAL = "[$__rate_interval]"
IN_TIME = f'sum by (queue) (rate({WAIT}_bucket{{{QUEUE},le="30.0"}}{INTERVAL}))'

PAGE = Page(
    file="queues-and-workers",
    uid="taskqueue-queues",
    title="Task queue / Queues and workers",
    says="What waits in each queue and for how long, and whether there are workers enough.",
    variables=(QUEUE_VARIABLE,),
    rows=(
        Row(
            title="Queues",
            panels=(
                Panel(
                    title="Messages that wait",
                    unit="short",
                    says="Length of each queue in Redis. No line: Redis is away. At 50,000 the relay holds further"
                    " messages back, in Postgres.",
                    queries=(Query(expr=most("taskqueue_queue_depth", "queue", QUEUE), legend="{{queue}}"),),
                ),
                Panel(
                    title="Age of the oldest due task, and its objective",
                    unit="s",
                    says="Over the objective for five minutes there is an alert, TaskqueueQueueLatencyHigh. `GET"
                    " /api/tasks/{id}/explain` of a task that waits says why; TASKQUEUE_LATENCY_OBJECTIVES sets what"
                    " is right for a queue.",
                    queries=(
                        Query(
                            expr=most("taskqueue_queue_oldest_message_age_seconds", "queue", QUEUE), legend="{{queue}}"
                        ),
                        Query(
                            expr=most("taskqueue_queue_latency_objective_seconds", "queue", QUEUE),
                            legend="objective of {{queue}}",
                        ),
                    ),
                ),
                Panel(
                    title="Unfinished tasks",
                    kind="stacked",
                    unit="short",
                    says="PENDING is due, SCHEDULED is not due yet, HELD waits for a pause or a limit, STARTED runs."
                    " PENDING grows: add workers. HELD grows: the limit is lower than what comes in, see `GET"
                    " /api/queues`.",
                    queries=(Query(expr=most("taskqueue_tasks", "queue, state", QUEUE), legend="{{queue}} {{state}}"),),
                ),
                Panel(
                    title="In and out",
                    unit="ops",
                    says="Tasks a second that come into a queue, are begun and are finished. More come in than begin:"
                    " the queue grows. More begin than finish: attempts are repeated, see the page about tasks.",
                    queries=(
                        Query(
                            expr=rate("taskqueue_tasks_submitted_total", "queue", f'{QUEUE},outcome="accepted"'),
                            legend="{{queue}} accepted",
                        ),
                        Query(
                            expr=rate("taskqueue_task_attempts_started_total", "queue", QUEUE), legend="{{queue}} begun"
                        ),
                        Query(expr=rate("taskqueue_tasks_finished_total", "queue", QUEUE), legend="{{queue}} finished"),
                    ),
                ),
                Panel(
                    title="How long tasks wait",
                    kind="heatmap",
                    unit="s",
                    says="From when a task was due to when it began, in all chosen queues. A second band far above"
                    " the first: some tasks wait behind slow ones, give those a queue of their own.",
                    queries=(Query(expr=f"sum by (le) (increase({WAIT}_bucket{{{QUEUE}}}{INTERVAL}))"),),
                ),
                Panel(
                    title="Wait",
                    unit="s",
                    says="As the picture before, as percentiles over all chosen queues. Grows: there are too few"
                    " slots.",
                    queries=quantiles(WAIT, QUEUE),
                ),
                Panel(
                    title="Share of late starts",
                    unit="percentunit",
                    steps=((None, "green"), (0.01, "red")),
                    says="Begun more than 30 s after being due, by queue. 1 % are allowed. Above: add workers to the"
                    " pool of this queue.",
                    queries=(
                        Query(
                            expr=f"1 - {IN_TIME} / sum by (queue) (rate({WAIT}_count{{{QUEUE}}}{INTERVAL}))",
                            legend="{{queue}}",
                        ),
                    ),
                ),
                Panel(
                    title="Paused",
                    unit="short",
                    says="1 while a queue is paused; its tasks are HELD. Nobody remembers why: `POST"
                    " /api/queues/{name}/resume`.",
                    queries=(Query(expr=most("taskqueue_queue_paused", "queue", QUEUE), legend="{{queue}}"),),
                ),
                Panel(
                    title="Messages that claimed nothing",
                    unit="ops",
                    says="Duplicates and stale messages; harmless. Much of it without cancels: more than this service"
                    " writes to its Redis.",
                    queries=(
                        Query(expr=rate("taskqueue_task_redeliveries_total", "queue", QUEUE), legend="{{queue}}"),
                    ),
                ),
            ),
        ),
        Row(
            title="Workers",
            panels=(
                Panel(
                    title="Slots, and busy ones",
                    unit="short",
                    says="How many tasks each pool can run at once, and runs. Slots fall: workers are gone, see their"
                    " pods. Busy is as high as slots for long: add workers.",
                    queries=(
                        Query(expr=total("taskqueue_worker_slots", "pool", NAMESPACE), legend="{{pool}} slots"),
                        Query(expr=total("taskqueue_worker_busy_slots", "pool", NAMESPACE), legend="{{pool}} busy"),
                    ),
                ),
                Panel(
                    title="Workers of each queue",
                    unit="short",
                    says="How many workers consume it. None for a queue with tasks: no worker's TASKQUEUE_QUEUES"
                    " names it, or its pool is scaled to zero. See TaskqueueQueueHasNoWorkers.",
                    queries=(
                        Query(expr=f"count by (queue) (taskqueue_worker_queue_info{{{QUEUE}}})", legend="{{queue}}"),
                    ),
                ),
                Panel(
                    title="Longest running attempt, and the limit",
                    unit="s",
                    says="Over twice its queue's longest time limit nobody ends it: its worker's keeper does not"
                    " work, restart that worker. See TaskqueueTaskStuckRunning. A queue whose tasks have no limit"
                    " has no line.",
                    queries=(
                        Query(
                            expr=most("taskqueue_tasks_oldest_running_age_seconds", "queue", QUEUE), legend="{{queue}}"
                        ),
                        Query(
                            expr=most("taskqueue_task_time_limit_seconds", "queue", QUEUE), legend="limit of {{queue}}"
                        ),
                    ),
                ),
                Panel(
                    title="Processes started in the pool",
                    unit="ops",
                    says="Grows without a rollout: tasks crash, are killed at their limits, or leave memory behind."
                    " The page about tasks says which. Each keeper beyond the first of a worker is one that died or"
                    " stalled.",
                    queries=(
                        Query(expr=rate("taskqueue_worker_child_starts_total", "pool", NAMESPACE), legend="{{pool}}"),
                        Query(
                            expr=rate("taskqueue_worker_keeper_starts_total", "pool", NAMESPACE),
                            legend="keepers of {{pool}}",
                        ),
                    ),
                ),
                Panel(
                    title="Uncounted events",
                    unit="ops",
                    says="What the children told of their work and nobody read: the numbers of tasks are too low by"
                    " so much. The keeper was away or starved of CPU: its log says so.",
                    queries=(
                        Query(
                            expr=f"sum(rate(taskqueue_metric_events_dropped_total{{{NAMESPACE}}}{INTERVAL}))",
                            legend="dropped",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            title="Where these numbers come from",
            panels=(
                Panel(
                    title="Age of the state of the queues",
                    unit="s",
                    steps=((None, "green"), (120.0, "red")),
                    says="Since when the relay could not read what it exports of the queues. Grows: Postgres or Redis"
                    " is away, or no relay runs. See TaskqueueStateExporterStale.",
                    queries=(
                        Query(
                            expr=f"time() - {most(LAST_READ, '', NAMESPACE)}",
                            legend="age",
                        ),
                    ),
                ),
                Panel(
                    title="How long it takes to read",
                    unit="s",
                    says="The 95th percentile by source. It grows with the backlog, and is then read more rarely."
                    " Slow with a short backlog: look at Postgres.",
                    queries=(
                        Query(
                            expr=quantile(
                                0.95, "taskqueue_state_exporter_collect_duration_seconds", "source", NAMESPACE
                            ),
                            legend="{{source}}",
                        ),
                    ),
                ),
                Panel(
                    title="Sources that could not be read",
                    unit="ops",
                    says="Their series are gone meanwhile, never 0. See whether they answer: `taskqueue doctor`.",
                    queries=(
                        Query(
                            expr=rate("taskqueue_state_exporter_errors_total", "source", NAMESPACE), legend="{{source}}"
                        ),
                    ),
                ),
            ),
        ),
    ),
)
