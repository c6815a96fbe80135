"""Any ASGI application, served as our own API is: gunicorn with one uvicorn worker, uvloop and httptools.

PORT=… python -m benchmarks.suite.serve benchmarks.suite.empty:app
"""

import sys
from importlib import import_module
from typing import Any

from gunicorn.app.base import BaseApplication

from app.cli import gunicorn_options
from app.core import config


class Application(BaseApplication):  # type: ignore[misc]  # gunicorn ships no types
    """Gunicorn under the settings of our API."""

    def __init__(self, name: str) -> None:
        self._name = name
        super().__init__()

    def load_config(self) -> None:
        """The same options."""
        for name, value in gunicorn_options(config.load(None)).items():
            self.cfg.set(name, value)
        self.cfg.set("proc_name", self._name)

    def load(self) -> Any:
        """In the worker, as ours."""
        module, _, name = self._name.partition(":")
        return getattr(import_module(module), name)


if __name__ == "__main__":
    Application(sys.argv[1]).run()
