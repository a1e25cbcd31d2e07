"""A ground for each fault: a site of its own and one workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.faults.ground import Ground, ground
from tests.sites import Site


@pytest.fixture
def here(need: Callable[..., None]) -> Iterator[Ground]:
    need("nft")
    with Site() as site, ground(site) as made:
        yield made
