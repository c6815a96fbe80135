"""What every process needs and what needs nothing else: settings, errors, backoff, telemetry."""
