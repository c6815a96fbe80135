"""The API process: what is made once, the routes, and how errors are rendered."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator
from functools import partial

from fastapi import FastAPI

from app import __doc__ as summary
from app import __version__, catalog, migrations
from app.backlog import Backlog
from app.broker import Broker
from app.core import metrics, telemetry
from app.core.config import Settings
from app.core.stopping import hearing, stop
from app.db import Database
from app.gathering import SUBMIT_LANES, Gathering, Statuses, Submits
from app.keys import Masters
from app.publisher import Publisher
from app.routers import (
    attempts,
    documentation,
    door,
    explain,
    following,
    health,
    jobs,
    lanes,
    listing,
    measuring,
    methods,
    openapi,
    problems,
    queues,
    reruns,
    schedules,
    tasks,
    trials,
    webhook_secrets,
    webhooks,
)
from app.routers import catalog as catalog_routes
from app.routers.state import State
from app.turns import Turns
from app.utils.guard import EgressRules
from app.utils.sealing import Seal
from app.watch import Watch

PROCESS_NAME = "api"
APPLICATION_NAME = "taskqueue-api"
MAX_CONNECTIONS = 10
MAX_REDIS_CONNECTIONS = 5
"""One of them listens."""
RING_AGAIN_SECONDS = 1.0
GARBAGE_THRESHOLDS = (20_000, 50, 100)
"""Of Python's collector, where the usual ones are (700, 10, 10): a request makes hardly any cycles, and a collection of
all that an API has loaded takes longer than answering a hundred of them."""

log = logging.getLogger(__name__)


def check(settings: Settings) -> None:
    """Find out whether the API can run under these settings, without opening anything.

    Raises:
        SettingsError: if one of the operator's task modules can't be imported, or keys are asked for
            and there is no secret to know them by.
    """
    if settings.auth_mode == "api-key":
        Masters.of(settings.secret_keys)
    catalog.load_modules(settings)


def create_app(settings: Settings) -> FastAPI:
    """The API under these settings. Nothing is opened before its lifespan begins.

    Raises:
        SettingsError: as `check`.
    """
    check(settings)
    telemetry.configure(settings, PROCESS_NAME)
    # They tell of the operator's own tasks, which is nothing for strangers.
    open_to_all = settings.auth_mode == "none" or settings.public_docs
    api = FastAPI(
        title="Task Queue Worker API",
        version=__version__,
        description=summary or "",
        lifespan=_Lifespan(settings),
        redirect_slashes=False,
        docs_url="/docs" if open_to_all else None,
        redoc_url="/redoc" if open_to_all else None,
        openapi_url="/openapi.json" if open_to_all else None,
        generate_unique_id_function=openapi.operation_id,
        telemetry=telemetry.NOT_BY_FASTAPI,
    )
    # Before the routes with an id: `counts` is none.
    api.include_router(listing.router)
    api.include_router(jobs.router)
    api.include_router(tasks.router)
    api.include_router(reruns.router)
    api.include_router(attempts.router)
    api.include_router(explain.router)
    api.include_router(catalog_routes.router)
    api.include_router(following.router)
    api.include_router(webhooks.router)
    api.include_router(webhook_secrets.router)
    api.include_router(trials.router)
    api.include_router(queues.router)
    api.include_router(schedules.router)
    api.include_router(health.router)
    if not open_to_all:
        api.include_router(documentation.router)
    methods.install(api)
    lanes.install(api)
    problems.install(api)
    openapi.install(api, catalog_routes.ANY)
    door.install(api, settings)
    if settings.metrics_port:
        measuring.install(api)
    telemetry.instrument(api)
    return api


class _Lifespan:
    """Opens what requests share, and closes it in the opposite order."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @contextlib.asynccontextmanager
    async def __call__(self, _: FastAPI) -> AsyncIterator[State]:
        settings = self._settings
        telemetry.configure_logging(settings, PROCESS_NAME)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(telemetry.shutdown)
            stack.callback(metrics.serve(settings.metrics_port, "api", revision=settings.revision))
            _expect(settings)
            db = Database(settings.postgres_dsn, max_connections=MAX_CONNECTIONS, application_name=APPLICATION_NAME)
            stack.push_async_callback(db.close)
            stack.callback(metrics.watch_pool(db.connections))
            broker = Broker(
                settings.redis_url.get_secret_value(),
                client_name=APPLICATION_NAME,
                max_connections=MAX_REDIS_CONNECTIONS,
            )
            stack.push_async_callback(broker.close)
            publisher = Publisher(db, broker)
            stack.push_async_callback(stop, asyncio.create_task(_keep_ringing(publisher)))
            backlog = Backlog(db, cap=settings.max_backlog)
            stack.push_async_callback(stop, asyncio.create_task(backlog.run()))
            guarded = door.Door.of(settings, db)
            if guarded is not None:
                stack.push_async_callback(stop, asyncio.create_task(guarded.run()))
            submits, statuses = Gathering(Submits(db), lanes=SUBMIT_LANES), Gathering(Statuses(db))
            for kind, line in (("submit", submits), ("status", statuses)):
                stack.callback(metrics.watch_line(kind, partial(len, line)))
            watch = Watch(db, broker, shared=guarded is not None)
            stack.push_async_callback(stop, asyncio.create_task(_keep_watching(watch)))
            stack.callback(watch.close)
            stack.enter_context(hearing(watch.close))
            # What is there now stays, so no collection looks at it again.
            stack.callback(gc.set_threshold, *gc.get_threshold())
            stack.callback(gc.unfreeze)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GARBAGE_THRESHOLDS)
            yield State(
                settings=settings,
                db=db,
                broker=broker,
                publisher=publisher,
                submits=submits,
                statuses=statuses,
                backlog=backlog,
                rules=EgressRules.from_settings(settings),
                readiness=health.Readiness(db, broker, needed_revision=migrations.head()),
                seal=Seal.from_settings(settings),
                trial_turns=Turns("test events", of_one=trials.OWNER_WAITS, of_all=trials.ALL_WAIT),
                redelivery_turns=Turns("redeliveries", of_one=1, of_all=webhooks.REDELIVERIES_AT_ONCE),
                door=guarded,
                watch=watch,
            )


def _expect(settings: Settings) -> None:
    metrics.expect_requests()
    for entry in catalog.entries():
        metrics.expect_submits(entry.name, entry.queue or settings.queues[0])


async def _keep_ringing(publisher: Publisher) -> None:
    # A bell that is never rung is found by the relay, but only after its grace: so this must not end.
    while True:
        try:
            await publisher.run()
        except Exception:
            log.exception("the publisher stopped; it starts again")
        await asyncio.sleep(RING_AGAIN_SECONDS)


async def _keep_watching(watch: Watch) -> None:
    # Whoever waits would wait in vain.
    while True:
        try:
            await watch.run()
        except Exception:
            log.exception("the watch stopped; it starts again")
        await asyncio.sleep(RING_AGAIN_SECONDS)
