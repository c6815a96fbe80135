"""What a caller of the API may be allowed to do. The words stand in the database, so they keep their meaning."""

from enum import StrEnum


class Scope(StrEnum):
    """What a caller may be allowed to do."""

    TASKS_READ = "tasks:read"
    """See their own tasks, results, webhooks and events."""
    TASKS_WRITE = "tasks:write"
    """Submit tasks, and end their own."""
    WEBHOOKS = "webhooks"
    """Have webhooks sent again, and keep the secrets that sign them."""
    ADMIN = "admin"
    """What concerns everybody, such as a pause of a queue; and all of the above, for their own tasks."""
