"""What all tests share: sites, and the check that a test leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.sites import Site

PARTS = ("fusermount3", "redis-server", "vim", "dash", "strace", "setfattr", "nft")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allow-missing", action="store_true", help="skip what this machine lacks the parts for"
    )


@pytest.fixture
def need(request: pytest.FixtureRequest) -> object:
    """Return a function that fails the test when a program is missing (or skips, when told)."""

    def check(*programs: str) -> None:
        missing = [name for name in programs if shutil.which(name) is None]
        if missing:
            text = f"missing: {' '.join(missing)}; contrib/check installs them"
            if request.config.getoption("--allow-missing"):
                pytest.skip(text)
            pytest.fail(text)

    return check


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as made:
        yield made
        assert made.agent is not None and made.mount is not None


@pytest.fixture(scope="module")
def shared_site() -> Iterator[Site]:
    """One site for the tests of a module that do not disturb each other."""
    with Site() as made:
        yield made
