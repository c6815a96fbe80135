"""Our figures beside those of what a user would pick instead, all on one Postgres and one Redis, in turns."""
