"""The webhook outbox: who is to hear of what, and how far that has come.

    (a task ends) ──intend──▶ pending ──claim_due──▶ delivering ──settle──▶ delivered | exhausted
                                 ▲                     │  │
                                 │ └─── next attempt ──┤  └── lease ran out: claimed again
                                 │                     └── release, when its relay stops: pending
                                 └──give_up, when its receiver's circuit stays open──▶ exhausted

The row is written by the very statement that ends the task, so an event is
neither lost nor invented. A relay claims what is due, sends without a
transaction open, and settles by the receipt. Claim and settle are fenced by a
random token, as those of a task are: a relay that was presumed dead changes
nothing. Its POST may have arrived all the same, so delivery is at least once,
under one id.

Beside it are the secrets that sign an owner's webhooks, and test events, which
are no part of the outbox: nothing has happened that they would tell.
"""

from app.delivery.census import count_due, oldest_due_seconds
from app.delivery.events import INLINE_BYTES, Told, body, intend, is_told, tells, told_columns
from app.delivery.feed import Event, events, number
from app.delivery.outbox import (
    BEGINNING,
    CIRCUIT_OPEN,
    EXCERPT_BYTES,
    Claimed,
    Due,
    Receiver,
    Settling,
    claim_by_receiver,
    claim_due,
    give_up,
    release,
    settle,
    settle_batch,
)
from app.delivery.reads import Attempt, State, attempts, state_of
from app.delivery.redelivery import Batch, Mark, Redelivery, redeliver, redeliver_batch
from app.delivery.rules import (
    ATTEMPTS_AT_MOST,
    ENDED_UNSENT,
    GONE,
    HOPELESS,
    REST_SECONDS,
    UNSENT,
    Verdict,
    decide,
    is_spent,
    patience_seconds,
)
from app.delivery.secret import (
    SECRETS_AT_MOST,
    NewSecret,
    Sealed,
    Secret,
    Unplaced,
    belongs_to,
    marks,
    place_secret,
    prune_secrets,
    reseal,
    revoke_secret,
    sealed_secrets,
    secrets,
    secrets_under,
)
from app.delivery.trial import (
    OWNER_AT_ONCE,
    PICKUP_SECONDS,
    TEST,
    Trial,
    Tried,
    ask_trial,
    claim_trials,
    end_trial,
    hear_trial,
    prune_trials,
    trial_body,
    withdraw_trial,
)

__all__ = [
    "ATTEMPTS_AT_MOST",
    "BEGINNING",
    "CIRCUIT_OPEN",
    "ENDED_UNSENT",
    "EXCERPT_BYTES",
    "GONE",
    "HOPELESS",
    "INLINE_BYTES",
    "OWNER_AT_ONCE",
    "PICKUP_SECONDS",
    "REST_SECONDS",
    "SECRETS_AT_MOST",
    "TEST",
    "UNSENT",
    "Attempt",
    "Batch",
    "Claimed",
    "Due",
    "Event",
    "Mark",
    "NewSecret",
    "Receiver",
    "Redelivery",
    "Sealed",
    "Secret",
    "Settling",
    "State",
    "Told",
    "Trial",
    "Tried",
    "Unplaced",
    "Verdict",
    "ask_trial",
    "attempts",
    "belongs_to",
    "body",
    "claim_by_receiver",
    "claim_due",
    "claim_trials",
    "count_due",
    "decide",
    "end_trial",
    "events",
    "give_up",
    "hear_trial",
    "intend",
    "is_spent",
    "is_told",
    "marks",
    "number",
    "oldest_due_seconds",
    "patience_seconds",
    "place_secret",
    "prune_secrets",
    "prune_trials",
    "redeliver",
    "redeliver_batch",
    "release",
    "reseal",
    "revoke_secret",
    "sealed_secrets",
    "secrets",
    "secrets_under",
    "settle",
    "settle_batch",
    "state_of",
    "tells",
    "told_columns",
    "trial_body",
    "withdraw_trial",
]
