"""What runs tasks: the task base class, the built-in tasks, and the keeper beside the pool."""
