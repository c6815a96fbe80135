"""What an attempt means for its delivery, and how long one may wait for any: pure functions, and no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.core import backoff
from app.core.statuses import DeliveryStatus
from app.utils import webhook
from app.utils.webhook import Outcome, Receipt

REST_SECONDS = 60.0
"""The least wait after a 429 or a timeout: a limit per minute would only be met again sooner."""
GONE = 410
HOPELESS = frozenset({Outcome.BLOCKED, Outcome.INVALID_URL})
"""What no second attempt changes; the user has to."""
LOCAL_FAULT_SECONDS = 60.0
"""The wait after a fault of our own network, which is not spread over days as a receiver's outage is."""
_PERHAPS_OURS = frozenset({Outcome.LOCAL_FAULT, Outcome.DNS_UNANSWERED})
LATE_SECONDS = 86_400.0
"""How much longer than its schedule a delivery waits for a receiver that nothing is sent to."""
ATTEMPTS_AT_MOST = 10_000
"""After so many a webhook can't be sent again: its attempts keep their numbers however often its schedule begins anew,
and a column of Postgres that holds them ends at 32,767."""
_WEARY = frozenset({Outcome.HTTP_429, Outcome.TIMEOUT})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt means for its delivery.

    Attributes:
        status: delivered, exhausted, or pending for another attempt.
        wait_seconds: until that attempt; 0 if there is none.
        spends: whether the attempt counts; one that was ours to lose does not, and is made again.
    """

    status: DeliveryStatus
    wait_seconds: float = 0.0
    spends: bool = True


UNSENT = Receipt(outcome=Outcome.LOCAL_FAULT)
ENDED_UNSENT = Verdict(DeliveryStatus.EXHAUSTED, spends=False)
"""What a delivery ends with that `is_spent` and was not sent again."""


def decide(attempt: int, receipt: Receipt, schedule: Sequence[float], *, age_seconds: float = 0.0) -> Verdict:
    """What to do after an attempt (Standard Webhooks, "Deliverability and reliability").

    Any 2xx delivers. A 410 ends it, as do a blocked address and a URL that is
    none. Everything else, a redirect included, is tried again while the schedule
    lasts, and `Retry-After` can only lengthen the wait.

    A fault of our own network spends no attempt, nor do name servers that don't
    answer: they may be ours. So that one which never ends, as of an address that we
    have no route to, does not keep a delivery for ever, it counts like any other
    once the whole schedule could be over. A secret
    that can't be read is ours to repair, however long that takes: nothing was asked
    of the receiver.

    Args:
        attempt: which attempt of the schedule the receipt is of, 1 for the first.
        receipt: what happened.
        schedule: seconds before each attempt, the first included.
        age_seconds: since the schedule began, or began anew.
    """
    if receipt.outcome is Outcome.SUCCESS:
        return Verdict(DeliveryStatus.DELIVERED)
    if receipt.outcome in _PERHAPS_OURS and age_seconds < max(sum(schedule), LOCAL_FAULT_SECONDS):
        return Verdict(DeliveryStatus.PENDING, backoff.spread(LOCAL_FAULT_SECONDS), spends=False)
    if receipt.outcome is Outcome.SECRET_UNREADABLE:
        return Verdict(DeliveryStatus.PENDING, backoff.spread(LOCAL_FAULT_SECONDS), spends=False)
    wait = backoff.scheduled_wait(schedule, attempt)
    if receipt.outcome in HOPELESS or receipt.status_code == GONE or wait is None:
        return Verdict(DeliveryStatus.EXHAUSTED)
    asked = min(receipt.retry_after_seconds or 0.0, webhook.RETRY_AFTER_LIMIT_SECONDS)
    rest = REST_SECONDS if receipt.outcome in _WEARY else 0.0
    return Verdict(DeliveryStatus.PENDING, max(wait, asked, rest))


def is_spent(attempt: int, scheduled_attempt: int, schedule: Sequence[float], *, age_seconds: float) -> bool:
    """Whether a delivery is ended unsent: only one that was lost with its relays, again and again, comes so far.

    Args:
        attempt: which attempt this would be, of all schedules; the last of them began within `ATTEMPTS_AT_MOST`.
        scheduled_attempt: which one of this schedule. A relay's death counts as one after `patience_seconds` only.
        schedule: seconds before each attempt, the first included.
        age_seconds: since the schedule began, or began anew.
    """
    if attempt > ATTEMPTS_AT_MOST + len(schedule):
        return True
    return scheduled_attempt > len(schedule) and age_seconds >= patience_seconds(schedule)


def patience_seconds(schedule: Sequence[float]) -> float:
    """How long after its schedule began a delivery is given up whose receiver is sent nothing: its circuit is open.

    What waits for a circuit spends no attempt, so no schedule ends it. It is longer than any schedule that is
    spent attempt by attempt, however its waits are spread.

    Args:
        schedule: seconds before each attempt, the first included.
    """
    return sum(schedule) * (1.0 + backoff.JITTER) + LATE_SECONDS
