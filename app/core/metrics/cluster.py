"""The catalogue of what relays show and do: the state of the queues, their sweeps, the webhooks."""

from app.core.metrics.metric import HOOK, RELAY, SWEEP, WAIT, Metric

STATE = (
    Metric(
        name="taskqueue_queue_depth",
        kind="gauge",
        labels=("queue",),
        exported_by=(RELAY,),
        says="Messages that wait in Redis.",
        do="Grows: see `taskqueue_queue_oldest_message_age_seconds`, and add workers.",
    ),
    Metric(
        name="taskqueue_queue_oldest_message_age_seconds",
        kind="gauge",
        labels=("queue",),
        exported_by=(RELAY,),
        says="Since when the task that is next has been due, with or without a message. 0: nothing is due."
        " What is held by a pause or a limit does not count.",
        do="Over the objective: `GET /api/tasks/{id}/explain` of a task that waits says why.",
    ),
    Metric(
        name="taskqueue_queue_latency_objective_seconds",
        kind="gauge",
        labels=("queue",),
        exported_by=(RELAY,),
        says="How long a due task may wait, from TASKQUEUE_LATENCY_OBJECTIVES.",
        do="Set what is right for the queue: one alert serves all.",
    ),
    Metric(
        name="taskqueue_queue_paused",
        kind="gauge",
        labels=("queue",),
        exported_by=(RELAY,),
        says="1 while the queue is paused, else 0.",
        do="Nobody remembers why: `POST /api/queues/{name}/resume`.",
    ),
    Metric(
        name="taskqueue_tasks",
        kind="gauge",
        labels=("queue", "state"),
        exported_by=(RELAY,),
        says="Unfinished tasks. `PENDING` is due, `SCHEDULED` is not due yet, retries among either; `HELD` waits for a"
        " pause or a limit; `STARTED` runs.",
        do="`HELD` grows: the limit is lower than what comes in. `PENDING` grows: add workers.",
    ),
    Metric(
        name="taskqueue_tasks_oldest_running_age_seconds",
        kind="gauge",
        labels=("queue",),
        exported_by=(RELAY,),
        says="How long the attempt has run that runs for longest. 0: nothing runs.",
        do="Over its limit for long: its worker's keeper is not working, restart that worker.",
    ),
    Metric(
        name="taskqueue_dead_letter_tasks",
        kind="gauge",
        labels=("queue",),
        exported_by=(RELAY,),
        says="Tasks that failed for good and are still kept, counted up to 100,000 in all, every minute.",
        do="Find out why, then run them again: `POST /api/tasks/rerun`. They go with their retention.",
    ),
    Metric(
        name="taskqueue_outbox_unsent",
        kind="gauge",
        labels=("kind",),
        exported_by=(RELAY,),
        says="What is due and was not sent: a `task` without a message, a `webhook`.",
        do="See its age.",
    ),
    Metric(
        name="taskqueue_outbox_oldest_unsent_age_seconds",
        kind="gauge",
        labels=("kind",),
        exported_by=(RELAY,),
        says="Since when the oldest of them has been due; 0 if there is none. Webhooks to receivers whose circuit is"
        " open don't count: they wait for their receiver.",
        do="`task`: Redis is away, or the queue is full. `webhook`: add relays.",
    ),
    Metric(
        name="taskqueue_webhook_due",
        kind="gauge",
        exported_by=(RELAY,),
        says="Webhooks that could be sent now, counted up to 100,000.",
        do="Grows: receivers are slow or dead, see `taskqueue_webhook_attempts_total`; else add relays.",
    ),
    Metric(
        name="taskqueue_webhook_oldest_due_age_seconds",
        kind="gauge",
        exported_by=(RELAY,),
        says="As `taskqueue_outbox_oldest_unsent_age_seconds` of webhooks.",
        do="Add relays, or look for what keeps them busy.",
    ),
    Metric(
        name="taskqueue_webhook_circuits_open",
        kind="gauge",
        exported_by=(RELAY,),
        says="Receivers that get nothing but probes, as this relay sees it.",
        do="The relay's log names their origins. Tell their owners; nothing is lost while they are down.",
    ),
    Metric(
        name="taskqueue_state_exporter_last_success_timestamp_seconds",
        kind="gauge",
        exported_by=(RELAY,),
        says="Unix time at which every source of these had last been read.",
        do="Old: Postgres or Redis is away. The series of a source that fails are gone, never 0.",
    ),
    Metric(
        name="taskqueue_state_exporter_collect_duration_seconds",
        kind="histogram",
        labels=("source",),
        exported_by=(RELAY,),
        buckets=SWEEP,
        says="How long a source took to read.",
        do="Grows with the backlog, and is then read more rarely.",
    ),
    Metric(
        name="taskqueue_state_exporter_errors_total",
        kind="counter",
        labels=("source",),
        exported_by=(RELAY,),
        says="Sources that could not be read.",
        do="See whether Postgres and Redis answer: `taskqueue doctor`.",
    ),
)
RELAYS = (
    Metric(
        name="taskqueue_relay_heartbeat_timestamp_seconds",
        kind="gauge",
        exported_by=(RELAY,),
        says="Unix time at which this relay last reached Postgres.",
        do="Old while the relay runs: Postgres is away, or the relay hangs.",
    ),
    Metric(
        name="taskqueue_relay_sweep_duration_seconds",
        kind="histogram",
        labels=("sweep",),
        exported_by=(RELAY,),
        buckets=SWEEP,
        says="How long a sweep took.",
        do="Longer than its interval: what it looks after comes late. Look at Postgres.",
    ),
    Metric(
        name="taskqueue_relay_sweep_errors_total",
        kind="counter",
        labels=("sweep",),
        exported_by=(RELAY,),
        says="Sweeps that failed; each is repeated.",
        do="The relay's log says why.",
    ),
    Metric(
        name="taskqueue_reconciler_recovered_total",
        kind="counter",
        labels=("reason",),
        exported_by=(RELAY,),
        says="What was put right: attempts whose lease ran out (`stale_running`), messages that Redis lost"
        " (`lost_message`), and rows that were due and had been left without one (`stuck_outbox`).",
        do="`lost_message`: Redis lost data, look at its persistence and eviction; or workers were killed whole, with"
        " short tasks that they had taken ahead. `stale_running`: workers die whole.",
    ),
)
WEBHOOKS = (
    Metric(
        name="taskqueue_webhook_attempts_total",
        kind="counter",
        labels=("outcome",),
        exported_by=(RELAY,),
        says="POSTs of webhooks, by what came of them.",
        do="Anything but `success` is the receiver's, except `local_fault` (our network) and `secret_unreadable`"
        " (TASKQUEUE_SECRET_KEY).",
    ),
    Metric(
        name="taskqueue_webhook_attempt_duration_seconds",
        kind="histogram",
        labels=("outcome",),
        exported_by=(RELAY,),
        buckets=HOOK,
        says="How long a POST took, the look-up of the name included.",
        do="Slow receivers cost places of a relay: add relays if webhooks are late.",
    ),
    Metric(
        name="taskqueue_webhook_deliveries_total",
        kind="counter",
        labels=("outcome",),
        exported_by=(RELAY,),
        says="Webhooks that ended: `delivered`, or `exhausted`.",
        do="`POST /api/tasks/{id}/webhook/redeliver` sends one again, `POST /api/webhooks/redeliver` many.",
    ),
    Metric(
        name="taskqueue_webhook_delivery_delay_seconds",
        kind="histogram",
        exported_by=(RELAY,),
        buckets=WAIT,
        says="From the event, or from when it was asked for again, to the 2xx.",
        do="Compare with the attempts: late without failures is a relay that can't keep up.",
    ),
)
