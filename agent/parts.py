"""The parts of a running agent, as the operations are given them."""

from __future__ import annotations

import os
from typing import NamedTuple

import trio

from .criu import Engine
from .ends import Ends
from .freezer import Freezer
from .images import Images
from .jobs import Jobs
from .journal import Journal
from .mounts import Mounts
from .retention import Retention
from .state import State
from .upkeep import Upkeep


class Parts(NamedTuple):
    """`engines` bounds how many CRIUs run at once; `nursery` ends with the agent."""

    state: State
    journal: Journal
    images: Images
    engine: Engine
    freezer: Freezer
    mounts: Mounts
    jobs: Jobs
    ends: Ends
    retention: Retention
    upkeep: Upkeep
    nursery: trio.Nursery
    engines: trio.CapacityLimiter
    run_dir: str
    state_dir: str
    keeper: str

    def job_log(self, number: int) -> str:
        """Return the path that the engine's words in a job are kept at."""
        return os.path.join(self.state_dir, "jobs", f"{number}.log.zst")
