"""The secrets that sign a caller's webhooks: listed, made, rotated, revoked. Each is shown once, to whoever made it."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response

from app import delivery, schemas
from app.core import errors, ids
from app.core.errors import FieldError
from app.routers import body, door, problems
from app.routers.state import Resources, State
from app.utils import signing

PATH = "/api/webhooks/secrets"
ONE = "/{id}"

router = APIRouter(prefix=PATH, tags=["webhooks"])

SecretId = Annotated[UUID, Path(alias="id", description="The `id` of the secret.")]

_UNPLACED = {
    delivery.Unplaced.FULL: f"{delivery.SECRETS_AT_MOST} secrets sign already: revoke one, or wait for a grace to end",
    delivery.Unplaced.KNOWN: "This secret signs already",
}


@router.get("", responses=problems.responses(422, 503))
async def list_secrets(state: Resources, caller: door.WebhookKeeper) -> schemas.SecretList:
    """The secrets that sign your webhooks, never shown again. Without any, the service's own signs them."""
    found = await delivery.secrets(state["db"], caller.owner)
    return schemas.SecretList(data=[schemas.SecretRead.model_validate(_shown(one)) for one in found])


@router.post(
    "",
    status_code=201,
    responses=problems.responses(400, 409, 413, 415, 422, 503),
    openapi_extra=body.declared(schemas.SecretRequest, required=False),
)
async def make_secret(
    request: Request, response: Response, state: Resources, caller: door.WebhookKeeper
) -> schemas.SecretMade:
    """Sign with a secret of your own from now on, beside those you have. The first one ends the service's own at once.

    To let receivers change over in peace, rotate instead.
    """
    wanted = await body.wanted(request, schemas.SecretRequest)
    return await _made(wanted, response, state, caller, grace_seconds=None)


@router.post(
    "/rotate",
    status_code=201,
    responses=problems.responses(400, 409, 413, 415, 422, 503),
    openapi_extra=body.declared(schemas.RotateRequest, required=False),
)
async def rotate_secrets(
    request: Request, response: Response, state: Resources, caller: door.WebhookKeeper
) -> schemas.SecretMade:
    """Sign with a new secret, and until the grace ends with what signed before as well: receivers know either."""
    wanted = await body.wanted(request, schemas.RotateRequest)
    return await _made(wanted, response, state, caller, grace_seconds=float(wanted.grace_seconds))


@router.delete(ONE, status_code=204, responses=problems.responses(404, 422, 503))
async def revoke_secret(secret_id: SecretId, state: Resources, caller: door.WebhookKeeper) -> None:
    """Sign with it no more: every relay has heard of it within seconds. Without another, the service's own signs."""
    if not await delivery.revoke_secret(state["db"], caller.owner, secret_id):
        raise errors.SecretNotFound


async def _made(
    wanted: schemas.SecretRequest,
    response: Response,
    state: State,
    caller: door.Caller,
    *,
    grace_seconds: float | None,
) -> schemas.SecretMade:
    seal = state["seal"]
    if seal is None:
        raise errors.SecretNotStored(
            "Secrets can't be stored: TASKQUEUE_SECRET_KEY is not set. The service's own secret signs"
        )
    secret = wanted.secret or signing.new_secret(wanted.kind or "hmac")
    try:
        public_key = signing.public_key(secret)
    except ValueError as refused:
        raise errors.ValidationFailed([FieldError("/secret", str(refused))]) from None
    secret_id = ids.uuid7()
    new = delivery.NewSecret(
        id=secret_id,
        owner=caller.owner,
        sealed=seal.seal(secret, delivery.belongs_to(caller.owner, secret_id)),
        kind=signing.kind_of(secret),
        fingerprint=signing.fingerprint(secret),
        public_key=public_key,
    )
    placed = await delivery.place_secret(state["db"], new, grace_seconds=grace_seconds)
    if isinstance(placed, delivery.Unplaced):
        raise errors.SecretNotStored(_UNPLACED[placed])
    response.headers["Cache-Control"] = "no-store"
    return schemas.SecretMade.model_validate(_shown(placed) | {"secret": None if wanted.secret else secret})


def _shown(one: delivery.Secret) -> dict[str, object]:
    return {
        "id": one.id,
        "kind": one.kind,
        "fingerprint": one.fingerprint,
        "public_key": one.public_key,
        "created_at": one.created_at,
        "expires_at": one.expires_at,
        "default_signs_until": one.default_until,
    }
