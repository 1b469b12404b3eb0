"""What holds for every test."""

import pytest

from scan_kernels.selective_scan import OP


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Calls are prepared anew, so that what another test put in place of a function or a device is gone."""
    OP.forget()
    OP.settled.clear()
