"""The catalogue of what processes do: answer requests, take and publish tasks, run them."""

from app.core.metrics.metric import API, BYTES, HTTP, RELAY, RUN, SIZE, WAIT, WORKER, Metric

REQUESTS = (
    Metric(
        name="http_server_request_duration_seconds",
        kind="histogram",
        labels=("http_request_method", "http_route", "http_response_status_code"),
        exported_by=(API,),
        buckets=HTTP,
        says="From the first byte of a request to the last of its answer. The route is a template, empty if there is"
        " none; the status is empty if the client left before there was one.",
        do="5xx: read the API's log. Slow: look at Postgres, and at the pool's connections. Routes that wait"
        " (`/result?wait=`, `/events`) take as long as they were asked to.",
    ),
    Metric(
        name="http_server_active_requests",
        kind="gauge",
        labels=("http_request_method",),
        exported_by=(API,),
        says="Requests that are being answered.",
        do="Grows while latency does: the API or Postgres is saturated; add replicas of the one, or room to the other.",
    ),
    Metric(
        name="taskqueue_api_turned_away_total",
        kind="counter",
        labels=("reason",),
        exported_by=(API,),
        says="Requests of any route that were not let in: `credentials`, `scope` or `quota`.",
        do="`credentials` in bulk is somebody guessing, or a key that has expired: `taskqueue keys list`.",
    ),
    Metric(
        name="taskqueue_db_pool_connections",
        kind="gauge",
        labels=("state",),
        exported_by=(API,),
        says="Connections of this process to Postgres: `in_use` or `idle`.",
        do="All in use for long: statements wait for each other. Look for slow ones in `pg_stat_activity`.",
    ),
    Metric(
        name="taskqueue_db_waiting_calls",
        kind="gauge",
        labels=("kind",),
        exported_by=(API,),
        says="Submits, and looks at a status, that stand in line for the next statement, which they share: `kind`.",
        do="Hundreds for long: Postgres answers slowly. Look for what it waits for in `pg_stat_activity`.",
    ),
    Metric(
        name="taskqueue_build_info",
        kind="gauge",
        labels=("version", "revision"),
        exported_by=(API, WORKER, RELAY),
        says="What runs here; always 1.",
        do="Two values for longer than a rollout takes: it is stuck.",
    ),
)
SUBMITS = (
    Metric(
        name="taskqueue_tasks_submitted_total",
        kind="counter",
        labels=("task", "queue", "outcome"),
        exported_by=(API, WORKER, RELAY),
        says="Tasks that were `accepted`, or were there already: `replayed` under an Idempotency-Key, `deduplicated` by"
        " `unique_for`. Workers submit from within tasks, relays for schedules.",
        do="Falls to nothing: look at `taskqueue_submit_rejected_total`, then at the clients.",
    ),
    Metric(
        name="taskqueue_submit_rejected_total",
        kind="counter",
        labels=("reason",),
        exported_by=(API,),
        says="Submits that were refused, and other requests that change tasks and were not let in.",
        do="`backpressure`: the backlog is at TASKQUEUE_MAX_BACKLOG, add workers. `unavailable`: Postgres is away."
        " `rate_limited`: a client is over its quota. The others are the client's own.",
    ),
    Metric(
        name="taskqueue_submit_payload_bytes",
        kind="histogram",
        labels=("task",),
        exported_by=(API,),
        buckets=BYTES,
        says="Arguments of an accepted task, as JSON.",
        do="Grows: have the client put the data elsewhere, and submit a reference to it.",
    ),
)
MESSAGES = (
    Metric(
        name="taskqueue_outbox_published_total",
        kind="counter",
        labels=("kind", "outcome"),
        exported_by=(API, WORKER, RELAY),
        says="Messages that were pushed to Redis (`sent`), or could not be (`error`). `kind` is `task`.",
        do="Errors: Redis is away, full or a replica. Nothing is lost, the relay pushes what is due later.",
    ),
    Metric(
        name="taskqueue_outbox_publish_delay_seconds",
        kind="histogram",
        labels=("kind",),
        exported_by=(API, WORKER, RELAY),
        buckets=WAIT,
        says="From when a task was due to when Redis had its message, for those that were pushed the first time.",
        do="Grows: Redis is slow, a queue is full (50,000 messages), or no relay runs.",
    ),
    Metric(
        name="taskqueue_outbox_batch_size",
        kind="histogram",
        exported_by=(API, WORKER, RELAY),
        buckets=SIZE,
        says="Messages that were pushed with one command.",
        do="Large batches are a burst, or a relay that catches up.",
    ),
)
TASKS = (
    Metric(
        name="taskqueue_task_attempts_started_total",
        kind="counter",
        labels=("task", "queue"),
        exported_by=(WORKER,),
        says="Attempts that began: a worker has claimed the task.",
        do="Stands still while the queue is not empty: workers are away, paused, or all busy.",
    ),
    Metric(
        name="taskqueue_task_attempts_total",
        kind="counter",
        labels=("task", "queue", "outcome"),
        exported_by=(WORKER, RELAY),
        says="Attempts that ended. `lost`: its process died, or its worker was lost (told by the relay); `released`:"
        " handed back by a worker that stops; `refused`: the arguments did not fit this release. One whose process"
        " dies is told by the keeper, so nothing is counted by who can't count any more.",
        do="`lost`: look for OutOfMemory in `taskqueue_task_exceptions_total`, and at the nodes. `retried`: see what"
        " they raise. `timed_out`: raise the limit, or find out what hangs.",
    ),
    Metric(
        name="taskqueue_tasks_finished_total",
        kind="counter",
        labels=("task", "queue", "outcome"),
        exported_by=(API, WORKER, RELAY),
        says="Tasks that ended, each once, counted by whoever ended it. `lost`: its process or worker died too often.",
        do="A failed task is found with `GET /api/tasks?status=FAILURE`, and run again with `POST /api/tasks/rerun`.",
    ),
    Metric(
        name="taskqueue_task_exceptions_total",
        kind="counter",
        labels=("task", "exception"),
        exported_by=(WORKER, RELAY),
        says="What attempts failed with, by class name: the first 100 of a process, then `other`.",
        do="`GET /api/tasks/{id}/attempts` has the traceback and the last lines that were logged.",
    ),
    Metric(
        name="taskqueue_task_queue_wait_seconds",
        kind="histogram",
        labels=("task", "queue"),
        exported_by=(WORKER,),
        buckets=WAIT,
        says="From when a task could start (it was due) to its claim.",
        do="Grows: there are too few slots. Add workers, or a pool of its own for what takes long.",
    ),
    Metric(
        name="taskqueue_task_run_duration_seconds",
        kind="histogram",
        labels=("task", "queue", "outcome"),
        exported_by=(WORKER,),
        buckets=RUN,
        says="How long an attempt's code ran.",
        do="Grows: look at what the task calls; give it a time limit.",
    ),
    Metric(
        name="taskqueue_task_end_to_end_seconds",
        kind="histogram",
        labels=("task", "queue", "outcome"),
        exported_by=(API, WORKER, RELAY),
        buckets=RUN,
        says="From the submit to the end of the task, retries, delays and waits included.",
        do="Compare with wait and run: what is left are retries and delays that were asked for.",
    ),
    Metric(
        name="taskqueue_task_redeliveries_total",
        kind="counter",
        labels=("queue",),
        exported_by=(WORKER,),
        says="Messages that claimed nothing: duplicates, stale ones, those of tasks that were cancelled or have"
        " expired. One whose task is held by a pause or a limit is none of them.",
        do="Harmless. A lot of it without cancels: more than one thing writes to this Redis.",
    ),
)
WORKERS = (
    Metric(
        name="taskqueue_worker_slots",
        kind="gauge",
        labels=("pool",),
        exported_by=(WORKER,),
        says="Tasks that this worker can run at once. A pool is called by its queues.",
        do="The sum falls: workers are gone.",
    ),
    Metric(
        name="taskqueue_worker_busy_slots",
        kind="gauge",
        labels=("pool",),
        exported_by=(WORKER,),
        says="Tasks that this worker runs.",
        do="All busy for long: add workers, or raise the limit of the autoscaler.",
    ),
    Metric(
        name="taskqueue_worker_queue_info",
        kind="gauge",
        labels=("pool", "queue"),
        exported_by=(WORKER,),
        says="A queue that this worker consumes; always 1.",
        do="None for a queue that has tasks: no worker's TASKQUEUE_QUEUES names it.",
    ),
    Metric(
        name="taskqueue_worker_child_starts_total",
        kind="counter",
        labels=("pool",),
        exported_by=(WORKER,),
        says="Processes that the pool has started.",
        do="Grows without a rollout: tasks crash, are killed at their limits, or leave memory behind.",
    ),
    Metric(
        name="taskqueue_worker_keeper_starts_total",
        kind="counter",
        labels=("pool",),
        exported_by=(WORKER,),
        says="Keepers that the worker has started. One looks after the pool, and claims and settles for it.",
        do="More than one of a worker: it dies or stalls, and no task begins meanwhile. The worker's log says why.",
    ),
    Metric(
        name="taskqueue_task_time_limit_seconds",
        kind="gauge",
        labels=("queue",),
        exported_by=(WORKER,),
        says="The longest time limit of the tasks whose queue this is, as they are registered; absent if one has none.",
        do="What runs for twice as long is stuck: no keeper ends it.",
    ),
    Metric(
        name="taskqueue_metric_events_dropped_total",
        kind="counter",
        exported_by=(WORKER,),
        says="Events of the pool's children that are in no metric, because nobody read them.",
        do="The keeper was away or starved of CPU; its log says so.",
    ),
)
