"""The first page to look at: are the promises kept, and if not, where to go on."""

from k8s.observability.panels import (
    API,
    JOB_VARIABLE,
    NAMESPACE,
    QUEUE,
    QUEUE_VARIABLE,
    Page,
    Panel,
    Query,
    Row,
    most,
    quantiles,
    rate,
    share,
    total,
)

REQUESTS = "http_server_request_duration_seconds"
SUBMIT = f'{NAMESPACE},http_route="/api/tasks/submit",http_request_method="POST"'
WAIT = "taskqueue_task_queue_wait_seconds"
ERRORS_ALLOWED = 0.001
LATE_ALLOWED = 0.01
ACTIVE = f'{NAMESPACE},http_route!~".*/(events|result)"'
"""Requests that are not asked to wait."""


def _range(metric: str, scope: str) -> str:
    return f"sum(rate({metric}{{{scope}}}[$__range]))"


SUBMIT_ERRORS = "namespace:taskqueue_submit_errors:ratio_rate"
START_LATE = "queue:taskqueue_start_late:ratio_rate"
FAILED_SUBMITS = share(
    _range(f"{REQUESTS}_count", f'{SUBMIT},http_response_status_code=~"5.."'), _range(f"{REQUESTS}_count", SUBMIT)
)
IN_TIME = f'{QUEUE},le="30.0"'
LATE_STARTS = f"1 - {_range(f'{WAIT}_bucket', IN_TIME)} / {_range(f'{WAIT}_count', QUEUE)}"

PAGE = Page(
    file="overview",
    uid="taskqueue-overview",
    title="Task queue / Overview",
    says="Whether submits are taken and tasks start in time, and where to look if not.",
    variables=(QUEUE_VARIABLE, JOB_VARIABLE),
    rows=(
        Row(
            title="Objectives",
            panels=(
                Panel(
                    title="Submits taken",
                    kind="stat",
                    width=4,
                    unit="percentunit",
                    steps=((None, "red"), (0.99, "orange"), (0.999, "green")),
                    says="Share of submits in the time shown that were not answered with a 5xx; the objective is 99.9"
                    " %. Below it: read the API's log, then see whether Postgres answers (`taskqueue doctor`).",
                    queries=(Query(expr=f"1 - {FAILED_SUBMITS}"),),
                ),
                Panel(
                    title="Error budget left: submits",
                    kind="stat",
                    width=4,
                    unit="percentunit",
                    steps=((None, "red"), (0.0, "orange"), (0.25, "green")),
                    says="What is left of the 0.1 % of submits that may fail, if the time shown is the budget's."
                    " Below 0 it is overspent: stop what is risky, such as rollouts, until it recovers.",
                    queries=(Query(expr=f"1 - ({FAILED_SUBMITS}) / {ERRORS_ALLOWED}"),),
                ),
                Panel(
                    title="Started within 30 s",
                    kind="stat",
                    width=4,
                    unit="percentunit",
                    steps=((None, "red"), (0.95, "orange"), (0.99, "green")),
                    says="Share of the attempts that began within 30 s of being due; the objective is 99 %. A queue"
                    " that stands still starts nothing and does not count: see the age of its oldest task. Below the"
                    " objective: add workers, or give slow tasks a queue of their own.",
                    queries=(Query(expr=f"1 - ({LATE_STARTS})"),),
                ),
                Panel(
                    title="Error budget left: starts",
                    kind="stat",
                    width=4,
                    unit="percentunit",
                    steps=((None, "red"), (0.0, "orange"), (0.25, "green")),
                    says="What is left of the 1 % of starts that may be late, if the time shown is the budget's."
                    " Below 0 it is overspent: find the queue on the page about queues and workers.",
                    queries=(Query(expr=f"1 - ({LATE_STARTS}) / {LATE_ALLOWED}"),),
                ),
                Panel(
                    title="Oldest due task",
                    kind="stat",
                    width=4,
                    unit="s",
                    steps=((None, "green"), (30.0, "orange"), (300.0, "red")),
                    says="Since when the task that is next has been due, in the worst queue. `GET"
                    " /api/tasks/{id}/explain` of a task that waits says why it does.",
                    queries=(Query(expr=most("taskqueue_queue_oldest_message_age_seconds", "", QUEUE)),),
                ),
                Panel(
                    title="Processes that answer",
                    kind="stat",
                    width=4,
                    unit="short",
                    says="How many of each process Prometheus reaches. Fewer than there should be: see why their pods"
                    " do not run, `kubectl get pods`, or whether Prometheus may reach port 9100.",
                    queries=(
                        Query(expr=f'count by (job) (up{{{NAMESPACE},job=~"taskqueue-.+"}} == 1)', legend="{{job}}"),
                    ),
                ),
                Panel(
                    title="Burn rate: submits",
                    unit="short",
                    width=8,
                    steps=((None, "green"), (6.0, "orange"), (14.4, "red")),
                    says="How many times faster than allowed submits fail; 1 spends the budget of 30 days in 30 days."
                    " An alert comes at 14.4 over an hour and at 6 over six. See TaskqueueSubmitErrorBudgetBurn.",
                    queries=tuple(
                        Query(
                            expr=f"{SUBMIT_ERRORS}{window}{{{NAMESPACE}}} / {ERRORS_ALLOWED}",
                            legend=f"over {window}",
                        )
                        for window in ("5m", "1h", "6h")
                    ),
                ),
                Panel(
                    title="Burn rate: starts",
                    unit="short",
                    width=8,
                    steps=((None, "green"), (6.0, "orange"), (14.4, "red")),
                    says="How many times faster than allowed tasks start late, by queue. An alert comes at 14.4 over"
                    " an hour and at 6 over six. See TaskqueueStartLatencyErrorBudgetBurn.",
                    queries=tuple(
                        Query(
                            expr=f"{START_LATE}{window}{{{QUEUE}}} / {LATE_ALLOWED}",
                            legend=f"{{{{queue}}}} over {window}",
                        )
                        for window in ("1h", "6h")
                    ),
                ),
                Panel(
                    title="Alerts that fire",
                    kind="table",
                    unit="short",
                    width=8,
                    says="Each has a runbook of its name in docs/runbooks. Empty is good.",
                    columns=("alertname", "severity", "queue", "task", "pool", "kind", "Series"),
                    queries=(
                        Query(
                            expr="count by (alertname, severity, queue, task, pool, kind) (ALERTS{alertname=~"
                            '"Taskqueue.+",alertstate="firing",namespace=~"$namespace|"})'
                        ),
                    ),
                ),
            ),
        ),
        Row(
            title="The flow of tasks",
            panels=(
                Panel(
                    title="Accepted and finished",
                    unit="ops",
                    says="Tasks a second. Finished below accepted for long: the backlog grows, add workers. Accepted"
                    " falls to nothing: see the refused submits, then ask the clients.",
                    queries=(
                        Query(
                            expr=f"sum(rate(taskqueue_tasks_submitted_total{{{QUEUE},"
                            'outcome="accepted"}[$__rate_interval]))',
                            legend="accepted",
                        ),
                        Query(
                            expr=f"sum(rate(taskqueue_tasks_finished_total{{{QUEUE}}}[$__rate_interval]))",
                            legend="finished",
                        ),
                    ),
                ),
                Panel(
                    title="Messages that wait",
                    unit="short",
                    says="Length of each queue in Redis. It says little by itself: a long queue that moves is fine."
                    " Look at the age of its oldest task. No line: Redis is away.",
                    queries=(Query(expr=most("taskqueue_queue_depth", "queue", QUEUE), legend="{{queue}}"),),
                ),
                Panel(
                    title="Age of the oldest due task",
                    unit="s",
                    says="How late each queue is. Grows steadily: no worker takes from it, or all are busy. See"
                    " TaskqueueQueueLatencyHigh.",
                    queries=(
                        Query(
                            expr=most("taskqueue_queue_oldest_message_age_seconds", "queue", QUEUE), legend="{{queue}}"
                        ),
                    ),
                ),
                Panel(
                    title="Busy share of each pool",
                    unit="percentunit",
                    steps=((None, "green"), (0.95, "red")),
                    says="Busy slots by slots. At 100 % for long, tasks wait for each other: add workers, or raise"
                    " the autoscaler's limit. See TaskqueueWorkerPoolSaturated.",
                    queries=(
                        Query(
                            expr=f"{total('taskqueue_worker_busy_slots', 'pool', NAMESPACE)}"
                            f" / {total('taskqueue_worker_slots', 'pool', NAMESPACE)}",
                            legend="{{pool}}",
                        ),
                    ),
                ),
                Panel(
                    title="Age of what is due and unsent",
                    unit="s",
                    says="Tasks without a message, and webhooks. `task` grows: Redis is away or a queue is full."
                    " `webhook` grows: add relays. See TaskqueueOutboxLagHigh.",
                    queries=(
                        Query(
                            expr=most("taskqueue_outbox_oldest_unsent_age_seconds", "kind", NAMESPACE),
                            legend="{{kind}}",
                        ),
                    ),
                ),
                Panel(
                    title="Webhooks that were taken",
                    unit="percentunit",
                    says="Share of POSTs that a receiver answered with a 2xx. Low: one receiver may be down, which is"
                    " its owner's. The page about webhooks says what went wrong.",
                    queries=(
                        Query(
                            expr="sum(rate(taskqueue_webhook_attempts_total{"
                            f'{NAMESPACE},outcome="success"}}[$__rate_interval]))'
                            f" / sum(rate(taskqueue_webhook_attempts_total{{{NAMESPACE}}}[$__rate_interval]))",
                            legend="taken",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            title="The API",
            panels=(
                Panel(
                    title="Requests",
                    unit="reqps",
                    kind="stacked",
                    says="Requests a second by route; probes are among them. A route without a name is a path that"
                    " does not exist: somebody guesses, or a client is wrong.",
                    queries=(Query(expr=rate(f"{REQUESTS}_count", "http_route", API), legend="{{http_route}}"),),
                ),
                Panel(
                    title="Answers that are errors",
                    unit="reqps",
                    says="By route and status. 5xx: read the API's log; 503 is Postgres, or a full backlog. 4xx are"
                    " the clients' own; 401 and 403 in bulk is somebody guessing keys.",
                    queries=(
                        Query(
                            expr=rate(
                                f"{REQUESTS}_count",
                                "http_response_status_code, http_route",
                                f'{API},http_response_status_code=~"[45].."',
                            ),
                            legend="{{http_response_status_code}} {{http_route}}",
                        ),
                    ),
                ),
                Panel(
                    title="Latency",
                    unit="s",
                    says="How long requests take, without those that are asked to wait (results and events). A point"
                    " leads to the trace of one request. Slow: look at Postgres and at the connections below.",
                    queries=tuple(
                        Query(expr=query.expr, legend=query.legend, exemplars=True)
                        for query in quantiles(REQUESTS, f'{ACTIVE},job=~"$job"')
                    ),
                ),
                Panel(
                    title="Refused submits",
                    unit="ops",
                    says="`backpressure`: the backlog is at TASKQUEUE_MAX_BACKLOG, add workers. `unavailable`:"
                    " Postgres is away. `rate_limited`: a client is over its quota. The others are the clients' own"
                    " mistakes.",
                    queries=(
                        Query(expr=rate("taskqueue_submit_rejected_total", "reason", NAMESPACE), legend="{{reason}}"),
                    ),
                ),
                Panel(
                    title="Turned away at the door",
                    unit="ops",
                    says="Requests of any route without a key that is good for them. `credentials` in bulk is"
                    " somebody guessing, or a key that has expired: `taskqueue keys list`.",
                    queries=(
                        Query(expr=rate("taskqueue_api_turned_away_total", "reason", NAMESPACE), legend="{{reason}}"),
                    ),
                ),
                Panel(
                    title="Requests in flight, and connections to Postgres",
                    unit="short",
                    says="Submits and looks at a status share statements: two of each are under way at a time, and"
                    " hundreds in line for long mean that Postgres is slow. So do connections that are all in use: look"
                    " for what waits in `pg_stat_activity`. Requests grow with latency: add replicas of the API.",
                    queries=(
                        Query(expr=f"sum(http_server_active_requests{{{API}}})", legend="requests"),
                        Query(
                            expr=total("taskqueue_db_pool_connections", "state", NAMESPACE),
                            legend="connections {{state}}",
                        ),
                        Query(
                            expr=total("taskqueue_db_waiting_calls", "kind", NAMESPACE),
                            legend="in line: {{kind}}",
                        ),
                    ),
                ),
                Panel(
                    title="Memory",
                    unit="bytes",
                    says="The largest process of each kind. Grows without end: something leaks; a rollout restarts"
                    " it, and a limit on memory ends it.",
                    queries=(
                        Query(
                            expr=f'max by (job) (process_resident_memory_bytes{{{NAMESPACE},job=~"taskqueue-.+"}})',
                            legend="{{job}}",
                        ),
                    ),
                ),
                Panel(
                    title="Processor time",
                    unit="short",
                    says="Cores in use by each kind of process; of workers that is the keeper's and the children's"
                    " where their exporter counts them. At its limit: raise it, or add replicas.",
                    queries=(
                        Query(
                            expr=rate("process_cpu_seconds_total", "job", f'{NAMESPACE},job=~"taskqueue-.+"'),
                            legend="{{job}}",
                        ),
                    ),
                ),
                Panel(
                    title="What runs",
                    kind="table",
                    unit="short",
                    says="Releases and how many processes run each. Two for longer than a rollout takes: it is stuck,"
                    " `kubectl rollout status`.",
                    columns=("version", "revision", "Processes"),
                    queries=(Query(expr=f"count by (version, revision) (taskqueue_build_info{{{NAMESPACE}}})"),),
                ),
            ),
        ),
    ),
)
