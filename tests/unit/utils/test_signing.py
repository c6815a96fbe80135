import base64
import json
import subprocess
import sys
from datetime import UTC, datetime
from uuid import uuid4

import pytest
import standardwebhooks
import svix.webhooks
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core import config
from app.utils import signing

OLD, NEW = b"o" * 24, b"n" * 64
SEED = bytes(range(32))
# The vectors of the standard's own text and of Svix's server: one message, signed both ways.
VECTOR_ID, VECTOR_SECONDS, VECTOR_BODY = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
SHARED = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SHARED_SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="
PRIVATE_SIGNATURE = "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="
ANYTHING = st.text(st.characters())  # surrogates, too


def secret(key: bytes, prefix: str = "whsec") -> str:
    return f"{prefix}_{base64.b64encode(key).decode()}"


def signed(keys: list[signing.Key], body: bytes, webhook_id: str = "id") -> dict[str, str]:
    seconds = int(datetime.now(UTC).timestamp())
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(seconds),
        "webhook-signature": signing.sign(keys, webhook_id, seconds, body),
    }


def accepted_by_the_published_libraries(whsec: str, headers: dict[str, str], body: bytes) -> bool:
    try:
        standardwebhooks.Webhook(whsec).verify(body.decode(), headers)
        svix.webhooks.Webhook(whsec).verify(body, headers)
    except (standardwebhooks.WebhookVerificationError, svix.webhooks.WebhookVerificationError):
        return False
    return True


@settings(deadline=None)
@given(st.binary(min_size=24, max_size=64), st.text())
def test_the_published_libraries_verify_every_signature(key: bytes, text: str) -> None:
    body = json.dumps({"text": text}).encode()
    headers = signed([signing.key(secret(key))], body, str(uuid4()))
    assert accepted_by_the_published_libraries(secret(key), headers, body)
    assert not accepted_by_the_published_libraries(secret(key), headers, body + b" ")


def test_whoever_knows_one_of_the_secrets_verifies_while_they_are_rotated() -> None:
    pair = signing.Ed25519Key.from_seed(SEED)
    headers = signed([OLD, pair, NEW], b"{}")
    assert [part.partition(",")[0] for part in headers["webhook-signature"].split(" ")] == ["v1", "v1a", "v1"]
    for known in (OLD, NEW):
        assert accepted_by_the_published_libraries(secret(known), headers, b"{}")
    assert not accepted_by_the_published_libraries(secret(b"x" * 32), headers, b"{}")
    for known_secret in (secret(OLD), secret(NEW), secret(pair.public_bytes, "whpk"), secret(SEED, "whsk")):
        signing.verify([known_secret], headers, b"{}", datetime.now(UTC).timestamp())


@pytest.mark.parametrize(("whsec", "signature"), [(SHARED, SHARED_SIGNATURE), (PRIVATE, PRIVATE_SIGNATURE)])
def test_the_signature_is_the_one_of_the_published_example(whsec: str, signature: str) -> None:
    assert signing.sign([signing.key(whsec)], VECTOR_ID, VECTOR_SECONDS, VECTOR_BODY) == signature


def test_an_ed25519_key_may_be_written_without_its_public_half() -> None:
    pair = signing.key("whsk_" + PRIVATE.removeprefix("whsk_")[:43] + "=")
    assert isinstance(pair, signing.Ed25519Key)
    assert secret(pair.public_bytes, "whpk") == PUBLIC


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsec_",
        "whsec_%",
        secret(b"x" * 23),
        secret(b"x" * 65),
        "hwsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
        PUBLIC,
        secret(b"x" * 31, "whsk"),
        secret(SEED + SEED, "whsk"),
        PRIVATE[:-4],
        PRIVATE.replace("X0dRqSKJp4", "aaaaaaaaaa"),
    ],
)
def test_what_is_no_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="must be whsec_") as refused:
        signing.key(text)
    assert text[8:] == "" or text[8:] not in str(refused.value)


def test_an_id_with_a_full_stop_is_not_signed() -> None:
    with pytest.raises(ValueError, match="full stop"):
        signing.sign([OLD], "a.b", 1, b"")


GOOD = {
    "Webhook-Id": VECTOR_ID,
    "WEBHOOK-TIMESTAMP": str(VECTOR_SECONDS),
    "webhook-signature": f"v2,x v1,bad {SHARED_SIGNATURE} {PRIVATE_SIGNATURE}",
}


@pytest.mark.parametrize("known", [[SHARED], [PRIVATE], [PUBLIC], [secret(OLD), SHARED]])
@pytest.mark.parametrize("away", [-300, 0, 300])
def test_a_webhook_is_verified_by_whoever_knows_a_secret(known: list[str], away: int) -> None:
    signing.verify(known, GOOD, VECTOR_BODY, VECTOR_SECONDS + away)


@pytest.mark.parametrize(
    ("known", "changed", "body", "away", "sentence"),
    [
        (SHARED, {"Webhook-Id": ""}, VECTOR_BODY, 0, "webhook-id is missing"),
        (SHARED, {"WEBHOOK-TIMESTAMP": ""}, VECTOR_BODY, 0, "webhook-timestamp is missing"),
        (SHARED, {"webhook-signature": " "}, VECTOR_BODY, 0, "webhook-signature is missing"),
        (SHARED, {"WEBHOOK-TIMESTAMP": "1.5"}, VECTOR_BODY, 0, "webhook-timestamp is no number"),
        (SHARED, {"WEBHOOK-TIMESTAMP": "9" * 5000}, VECTOR_BODY, 0, "webhook-timestamp is no number"),
        (SHARED, {}, VECTOR_BODY, 301, "301 s in the past"),
        (SHARED, {}, VECTOR_BODY, -301, "301 s in the future"),
        (SHARED, {}, VECTOR_BODY + b"\n", 0, "no signature matches"),
        (SHARED, {"Webhook-Id": "other"}, VECTOR_BODY, 0, "no signature matches"),
        (SHARED, {"WEBHOOK-TIMESTAMP": str(VECTOR_SECONDS + 1)}, VECTOR_BODY, 0, "no signature matches"),
        (secret(OLD), {}, VECTOR_BODY, 0, "no signature matches"),
        (PUBLIC, {}, VECTOR_BODY + b"\n", 0, "no signature matches"),
        (SHARED, {"webhook-signature": PRIVATE_SIGNATURE}, VECTOR_BODY, 0, "no v1 signature"),
        (PUBLIC, {"webhook-signature": SHARED_SIGNATURE}, VECTOR_BODY, 0, "no v1a signature"),
        (PUBLIC, {"webhook-signature": "v1a,***"}, VECTOR_BODY, 0, "no signature matches"),
    ],
)
def test_each_failed_check_is_named(known: str, changed: dict[str, str], body: bytes, away: int, sentence: str) -> None:
    with pytest.raises(signing.NotVerified, match=sentence):
        signing.verify([known], GOOD | changed, body, VECTOR_SECONDS + away)


@settings(deadline=None)
@given(ANYTHING, ANYTHING, ANYTHING, st.sampled_from([SHARED, PUBLIC]))
def test_whatever_the_headers_say_it_is_an_answer(webhook_id: str, seconds: str, signature: str, known: str) -> None:
    headers = {"webhook-id": webhook_id, "webhook-timestamp": seconds, "webhook-signature": signature}
    with pytest.raises(signing.NotVerified):
        signing.verify([known], headers, b"{}", 0.0)


@pytest.mark.parametrize("text", ["whpk_", "whpk_AAAA", "whpk_%", "nonsense"])
def test_what_is_no_key_to_verify_with_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be wh"):
        signing.verify([text], GOOD, VECTOR_BODY, VECTOR_SECONDS)


def test_a_process_without_ed25519_keys_does_not_wait_for_their_library() -> None:
    code = (
        "import sys; from app.utils import webhook, signing; "
        f"signing.sign([signing.key({SHARED!r})], 'id', 1, b''); sys.exit('cryptography' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_settings_spell_the_keys() -> None:
    settings = config.Settings.model_validate(
        {
            "DATABASE_URL": "postgresql://h/d",
            "REDIS_URL": "redis://h",
            "TASKQUEUE_AUTH_MODE": "none",
            "TASKQUEUE_WEBHOOK_SECRET": f"{PRIVATE} {SHARED}",
        }
    )
    signature = signing.sign(signing.keys(settings), VECTOR_ID, VECTOR_SECONDS, VECTOR_BODY)
    assert signature == f"{PRIVATE_SIGNATURE} {SHARED_SIGNATURE}"
