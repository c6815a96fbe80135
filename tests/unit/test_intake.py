"""What somebody asked for, and what is wrong with it."""

import pytest

from app import catalog, intake, schemas
from app.core import errors
from app.core.config import Settings
from app.utils.guard import EgressRules

URL = "https://10.0.0.1/hook"


def test_what_is_remembered_of_a_webhook_url_holds_under_its_rules_alone() -> None:
    settings = Settings.model_validate(
        {"DATABASE_URL": "postgresql://h/d", "REDIS_URL": "redis://h/0", "TASKQUEUE_AUTH_MODE": "none"}
    )
    catalog.load_modules(settings)
    wanted = schemas.SubmitRequest(webhook_url=URL)
    for _ in range(2):
        new = intake.new_task(wanted, settings, EgressRules(allow_private=True), owner="", traceparent="")
        assert new.webhook_url == URL
        with pytest.raises(errors.ValidationFailed) as refused:
            intake.new_task(wanted, settings, EgressRules(), owner="", traceparent="")
        assert [fault.pointer for fault in refused.value.errors] == ["/webhook_url"]
