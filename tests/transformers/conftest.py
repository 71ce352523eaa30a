"""The files of this folder are run by name (`make test-transformers`): they need the source package of transformers."""

import pytest

from .skips import is_listed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not is_listed(message := str(report.longrepr[-1])):
        report.outcome, report.longrepr = "failed", f"a skip that tests/transformers/skips.py does not list: {message}"
    return report
