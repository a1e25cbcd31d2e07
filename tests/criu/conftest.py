"""Stages for the tests of this directory: one site for many tests, and one with each freezer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.criu.stage import Stage, staged
from tests.sites import Site


@pytest.fixture
def stage(shared_site: Site) -> Iterator[Stage]:
    with staged(shared_site) as made:
        yield made


@pytest.fixture(scope="module", params=["v2", "v1"])
def freezing_site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with Site(freezer=request.param) as made:
        yield made


@pytest.fixture
def freezing_stage(freezing_site: Site) -> Iterator[Stage]:
    with staged(freezing_site) as made:
        yield made
