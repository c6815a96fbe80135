"""The relay's work: messages on their way to Redis, webhooks on their way to receivers."""

from k8s.observability.panels import (
    NAMESPACE,
    Page,
    Panel,
    Query,
    Row,
    most,
    quantile,
    quantiles,
    rate,
)

INTERVAL = "[$__rate_interval]"
ATTEMPTS = "taskqueue_webhook_attempts_total"
HEARTBEAT = "taskqueue_relay_heartbeat_timestamp_seconds"

PAGE = Page(
    file="webhooks-and-relay",
    uid="taskqueue-webhooks",
    title="Task queue / Webhooks and relay",
    says="Whether messages reach Redis and webhooks their receivers, and what the relay had to put right.",
    variables=(),
    rows=(
        Row(
            title="Webhooks",
            panels=(
                Panel(
                    title="POSTs by outcome",
                    kind="stacked",
                    unit="ops",
                    says="Anything but `success` is the receiver's, except `local_fault` (our network) and"
                    " `secret_unreadable` (TASKQUEUE_SECRET_KEY is not the one that sealed it). `blocked`: the"
                    " address is not allowed.",
                    queries=(Query(expr=rate(ATTEMPTS, "outcome", NAMESPACE), legend="{{outcome}}"),),
                ),
                Panel(
                    title="Share of POSTs that fail",
                    unit="percentunit",
                    steps=((None, "green"), (0.2, "red")),
                    says="Over 20 % there is an alert, TaskqueueWebhookFailureRatioHigh. One dead receiver is enough"
                    " for it where there are few: the relay's log names its origin.",
                    queries=(
                        Query(
                            expr=f'sum(rate({ATTEMPTS}{{{NAMESPACE},outcome!="success"}}{INTERVAL}))'
                            f" / sum(rate({ATTEMPTS}{{{NAMESPACE}}}{INTERVAL}))",
                            legend="failed",
                        ),
                    ),
                ),
                Panel(
                    title="From the event to the 2xx",
                    unit="s",
                    says="How late receivers hear of an end. Late without failed POSTs: the relays can't keep up, add"
                    " one. Late with them: retries.",
                    queries=quantiles("taskqueue_webhook_delivery_delay_seconds", NAMESPACE),
                ),
                Panel(
                    title="How long a POST takes (p95)",
                    unit="s",
                    says="By outcome. Slow receivers cost places of a relay: add relays if webhooks are late.",
                    queries=(
                        Query(
                            expr=quantile(0.95, "taskqueue_webhook_attempt_duration_seconds", "outcome", NAMESPACE),
                            legend="{{outcome}}",
                        ),
                    ),
                ),
                Panel(
                    title="Webhooks that ended",
                    unit="ops",
                    says="`exhausted`: given up after the last attempt. `POST /api/webhooks/redeliver` sends many"
                    " again, once their receiver is back.",
                    queries=(
                        Query(
                            expr=rate("taskqueue_webhook_deliveries_total", "outcome", NAMESPACE), legend="{{outcome}}"
                        ),
                    ),
                ),
                Panel(
                    title="Webhooks that are due",
                    unit="short",
                    says="That could be sent now, counted up to 100,000. Grows: receivers are slow or dead, else add"
                    " relays.",
                    queries=(Query(expr=most("taskqueue_webhook_due", "", NAMESPACE), legend="due"),),
                ),
                Panel(
                    title="Age of the oldest due webhook",
                    unit="s",
                    steps=((None, "green"), (900.0, "red")),
                    says="Over 15 min there is an alert, TaskqueueWebhookBacklogOld. Those of receivers whose circuit"
                    " is open don't count.",
                    queries=(
                        Query(expr=most("taskqueue_webhook_oldest_due_age_seconds", "", NAMESPACE), legend="age"),
                    ),
                ),
                Panel(
                    title="Receivers that get nothing but probes",
                    unit="short",
                    says="Their circuit is open: they failed too often. Tell their owners; nothing is lost while they"
                    " are down. The relay's log names their origins.",
                    queries=(
                        Query(expr=most("taskqueue_webhook_circuits_open", "", NAMESPACE), legend="open circuits"),
                    ),
                ),
            ),
        ),
        Row(
            title="Messages",
            panels=(
                Panel(
                    title="Due and unsent",
                    unit="short",
                    says="Tasks without a message, and webhooks. Tasks grow: Redis is away, or a queue is at 50,000"
                    " messages and the rest waits its turn.",
                    queries=(Query(expr=most("taskqueue_outbox_unsent", "kind", NAMESPACE), legend="{{kind}}"),),
                ),
                Panel(
                    title="Age of the oldest unsent",
                    unit="s",
                    steps=((None, "green"), (60.0, "red")),
                    says="Over a minute there is an alert, TaskqueueOutboxLagHigh. `task`: Redis is away or a queue"
                    " is full; `webhook`: add relays.",
                    queries=(
                        Query(
                            expr=most("taskqueue_outbox_oldest_unsent_age_seconds", "kind", NAMESPACE),
                            legend="{{kind}}",
                        ),
                    ),
                ),
                Panel(
                    title="Messages pushed",
                    unit="ops",
                    says="`error`: Redis is away, full, or a replica. Nothing is lost, the relay pushes what is due"
                    " later. See TaskqueueOutboxPublishErrors.",
                    queries=(
                        Query(
                            expr=rate("taskqueue_outbox_published_total", "outcome", NAMESPACE), legend="{{outcome}}"
                        ),
                    ),
                ),
                Panel(
                    title="From due to Redis",
                    unit="s",
                    says="How long a task waits for its first message. Grows: Redis is slow, a queue is full, or no"
                    " relay runs.",
                    queries=quantiles("taskqueue_outbox_publish_delay_seconds", NAMESPACE),
                ),
                Panel(
                    title="Messages of one command",
                    unit="short",
                    says="Large batches are a burst, or a relay that catches up after an outage.",
                    queries=quantiles("taskqueue_outbox_batch_size", NAMESPACE),
                ),
            ),
        ),
        Row(
            title="The relay",
            panels=(
                Panel(
                    title="Put right",
                    unit="ops",
                    says="`lost_message`: Redis lost data, look at its persistence and eviction; or workers were killed"
                    " whole, with short tasks that they had taken ahead. `stale_running`: workers die whole, look at"
                    " the nodes. `stuck_outbox`: a message came late, as after an outage"
                    " of Redis.",
                    queries=(
                        Query(
                            expr=rate("taskqueue_reconciler_recovered_total", "reason", NAMESPACE), legend="{{reason}}"
                        ),
                    ),
                ),
                Panel(
                    title="Since a relay last reached Postgres",
                    unit="s",
                    says="The relay that is best off. Grows: Postgres is away, or all relays hang: restart them.",
                    queries=(Query(expr=f"time() - {most(HEARTBEAT, '', NAMESPACE)}", legend="age"),),
                ),
                Panel(
                    title="Sweeps (p95)",
                    unit="s",
                    says="How long each takes. Longer than its interval: what it looks after comes late, look at"
                    " Postgres.",
                    queries=(
                        Query(
                            expr=quantile(0.95, "taskqueue_relay_sweep_duration_seconds", "sweep", NAMESPACE),
                            legend="{{sweep}}",
                        ),
                    ),
                ),
                Panel(
                    title="Sweeps that failed",
                    unit="ops",
                    says="Each is repeated; the relay's log says why. All of them: Postgres is away.",
                    queries=(
                        Query(expr=rate("taskqueue_relay_sweep_errors_total", "sweep", NAMESPACE), legend="{{sweep}}"),
                    ),
                ),
            ),
        ),
    ),
)
