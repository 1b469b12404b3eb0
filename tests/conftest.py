"""What holds for every test."""

import os

import pytest

from scan_kernels.selective_scan import OP


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_the_user(tmp_path_factory):
    """What this machine keeps for its user, such as tuned choices and ceilings, is neither read nor written."""
    os.environ["SCAN_KERNELS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Calls are prepared anew, so that what another test put in place of a function or a device is gone."""
    OP.forget()
    OP.settled.clear()
