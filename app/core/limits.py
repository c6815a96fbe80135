"""The bounds of a submit: HTTP, Python and the declaration of a task draw them alike."""

DAY_SECONDS = 86_400
YEAR_SECONDS = 31_536_000

MAX_RETRIES = 100
"""Runs after a failed first one; the table has the same bound in a CHECK."""
TIME_LIMIT_SECONDS = DAY_SECONDS
"""The longest that one attempt may take."""
AHEAD_SECONDS = YEAR_SECONDS
"""How far ahead a task may be due, or expire."""
BATCH = 1000
"""Tasks of one submit."""
KEY_SECONDS = DAY_SECONDS
"""How long the key of a submit stands for it."""
CONCURRENCY_KEY_LENGTH = 255
CONCURRENCY = 10_000
"""The highest limit of what runs at once: what runs is counted at each claim of a limited queue."""
RATE_COUNT = 1_000_000
RATE_SECONDS = DAY_SECONDS
TAGS = 20
TAG_LENGTH = 64
SCHEDULE_YEARS = 100
"""How far away a schedule may begin, or end."""
