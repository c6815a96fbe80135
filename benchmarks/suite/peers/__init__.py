"""The peers' no-op tasks, as their own documentation writes them.

These modules run in the peers' environment and import nothing of ours. Each
fills its queue when it is run, `python -m benchmarks.suite.peers.… COUNT`,
and is what its system's own worker loads. Where the queue is a key of Redis,
tasks are sent to another one, which then takes the queue's name: no worker
begins before all are there.
"""
