"""Has a worker take messages ahead however slow the machine is: tasks of any length are taken for short ones.

What it took ahead and did not begin it puts back as ever.
"""

from app.worker import bundles

bundles.AHEAD_SECONDS = 1000.0
bundles.MEMORY_SECONDS = 30.0
bundles.HOLD_SECONDS = 0.0
