"""After an error of CUDA nothing runs on the device any more: the worker ends, and pytest-xdist starts another one."""

import os

import pytest

_gone = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None and "CUDA error" in str(call.excinfo.value):
        _gone.append(item.nodeid)
    return report


def pytest_runtest_logfinish(nodeid, location):
    if _gone and "PYTEST_XDIST_WORKER" in os.environ:  # its report has been sent
        os._exit(3)
