"""What a pool's children share with the keeper: made by the worker's main process before it forks."""

import os
from dataclasses import dataclass

from app.worker.line import Door
from app.worker.slots import Slots
from app.worker.spool import Spool


@dataclass(frozen=True, slots=True)
class Desk:
    """Inherited by all processes of one worker.

    Attributes:
        slots: where children show what they run.
        spool: where they put what became of it.
        door: where their lines to the keeper go through.
    """

    slots: Slots
    spool: Spool
    door: Door

    @classmethod
    def create(cls, concurrency: int) -> "Desk":
        """A desk for so many children, and for their successors before the dead are cleared away."""
        slots = Slots.create(concurrency)
        return cls(slots, Spool.create(slots.count), Door.create())

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """What the keeper needs of it: slots, spool, and its side of the door."""
        return self.slots.fd, self.spool.fd, self.door.inside.fileno()

    def close(self) -> None:
        """Give up this process's share of it."""
        os.close(self.slots.fd)
        os.close(self.spool.fd)
        self.door.close()
