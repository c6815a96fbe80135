"""Test events: one POST each, at once, and no second attempt.

A relay sends them, through the sender, the rules and the keys of real webhooks. They
wait in no line, and no circuit holds them back: whoever asks wants to know how
things are now. What bounds them is how many the API lets wait at once, and how
many a relay sends at once, in all and of one owner.
"""

import asyncio
import contextlib

from app import db, delivery
from app.core import tracing
from app.core.config import Settings
from app.db import Database
from app.keyring import Keyring, Ring
from app.utils import sealing
from app.utils.webhook import DEADLINE_SECONDS, Outcome, Receipt, Sender

AT_ONCE = 10
"""Test events that one relay sends at once."""
REPORT_SECONDS = 3.0
"""How long a relay tries to say what came of one; longer than that, nobody waits."""
KEPT_SECONDS = 60.0
"""After that nobody comes back for one."""
PRUNED_AT_ONCE = 500


class Trials:
    """The test events of one relay.

    Args:
        settings: say what a body holds.
        db: where they are asked for.
        sender: of the relay's webhooks.
        keyring: likewise.

    Attributes:
        sending: those on their way, and the owner of each.
    """

    def __init__(self, settings: Settings, db: Database, sender: Sender, keyring: Keyring) -> None:
        self._settings = settings
        self._db = db
        self._sender = sender
        self._keyring = keyring
        self.sending: dict[asyncio.Task[None], str] = {}

    async def send(self) -> int:
        """Start sending those that were asked for just now."""
        room = AT_ONCE - len(self.sending)
        if room <= 0:
            return 0
        asked = await delivery.claim_trials(self._db, limit=room, sending=list(self.sending.values()))
        rings = await self._keyring.rings({one.owner for one in asked}) if asked else {}
        for one in asked:
            task = asyncio.create_task(self._send(one, rings[one.owner]))
            self.sending[task] = one.owner
            task.add_done_callback(self.sending.pop)
        return len(asked)

    async def _send(self, trial: delivery.Trial, ring: Ring) -> None:
        body = delivery.trial_body(trial, self._settings.webhook_payload)
        try:
            keys = ring.keys(trial.claimed_at)
        except sealing.Unreadable:
            receipt = Receipt(outcome=Outcome.SECRET_UNREADABLE)
        else:
            spans = tracing.Webhook(trial.traceparent, webhook_id=trial.id, attempt=1, url=trial.url)
            receipt = await self._sender.post(
                trial.url,
                webhook_id=str(trial.id),
                body=body,
                traceparent=spans.traceparent,
                timestamp_seconds=int(trial.claimed_at.timestamp()),
                owner=trial.owner,
                keys=keys,
            )
            error = None if receipt.outcome is Outcome.SUCCESS else str(receipt.outcome)
            spans.end(status_code=receipt.status_code, error_type=error, event=trial.event)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_SECONDS):
                await db.insist(lambda: delivery.end_trial(self._db, trial, receipt, body), what="a test's receipt")

    async def prune(self) -> int:
        """Remove those that nobody came back for."""
        return await delivery.prune_trials(self._db, older_than_seconds=KEPT_SECONDS, limit=PRUNED_AT_ONCE)


_ADVICE = {
    Outcome.SUCCESS: "The receiver took it: there is nothing to do",
    Outcome.HTTP_3XX: "Redirects are not followed: name the URL that this one leads to",
    Outcome.HTTP_4XX: "The receiver refused it: its answer may say why",
    Outcome.HTTP_429: "The receiver asks for a rest: a webhook waits for a minute or more, and is sent again",
    Outcome.HTTP_5XX: "The receiver failed: look into its log at the time of this request",
    Outcome.TIMEOUT: f"Answer with 2xx within {DEADLINE_SECONDS:g} seconds, before any work is done on the event",
    Outcome.CONNECT_ERROR: "No HTTP answer came: see whether the receiver runs, and whether its port is open to us",
    Outcome.TLS_ERROR: "TLS failed: the certificate must be of a public authority, for this name, and valid now",
    Outcome.DNS_ERROR: "The host has no address: look for a typing error in its name, or make its DNS record",
    Outcome.DNS_UNANSWERED: "No name server answered for the host: see whether those of its domain do; if they do, the "
    "fault is ours",
    Outcome.BLOCKED: "The host leads to a private or special address: name a public one, or ask whoever runs this "
    "service to put the origin into TASKQUEUE_WEBHOOK_ALLOWED_ORIGINS",
    Outcome.INVALID_URL: "The URL can't be called: see which ones can in the guide for receivers",
    Outcome.LOCAL_FAULT: "The fault is ours: this service's network failed; try again, and tell whoever runs it",
    Outcome.SECRET_UNREADABLE: "The fault is ours: a secret that should sign can't be read; tell whoever runs this "
    "service to look at TASKQUEUE_SECRET_KEY, or revoke the secret",
}
_ADVICE_ON_STATUS = {
    400: "The receiver refused it: see that it verifies the bytes that came, with a secret that signs now",
    401: "The receiver wants to know who calls: let it verify the signature instead",
    403: "The receiver lets nobody in: let it verify the signature, and see what stands before it",
    404: "The receiver knows no such path: look for a typing error in the URL",
    405: "The receiver takes no POST at this path: look for a typing error in the URL",
    410: "The receiver says that it is gone: a webhook would not be sent again",
    413: "The receiver takes no body of this size: raise its limit, or ask for TASKQUEUE_WEBHOOK_PAYLOAD=thin",
    415: "The receiver takes no application/json: let it",
}


def advice(outcome: Outcome, status_code: int | None) -> str:
    """What to do about it, in one sentence."""
    return _ADVICE_ON_STATUS.get(status_code or 0, _ADVICE[outcome])
