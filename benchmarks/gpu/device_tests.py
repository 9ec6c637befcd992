"""``pytest -m gpu`` on the device; in a rehearsal the same tests on the CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

from benchmarks.gpu.worker import Context

DEVICE_VARIABLE = "DPR_LIGHTNING_TEST_DEVICE"
"""Lets the tests of a GPU run on another device (tests/gpu/conftest.py)."""
_LARGEST_TRACEBACK = 4000


def run(context: Context) -> None:
    """Run the tests and report counts and failures."""
    report = context.work_dir / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-v", f"--junitxml={report}"]
    # One test that hangs leaves time for the others.
    command += ["--timeout=60"]
    num_cores = os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is not None and num_cores >= 8:
        # Most of a test's time is Python's, and the device has room for several.
        command += ["-n", str(min(5, num_cores // 2)), "--dist", "loadfile"]
    environment = os.environ | ({} if context.is_cuda else {DEVICE_VARIABLE: "cpu"})
    done = subprocess.run([*command, "tests/gpu"], env=environment, stdout=sys.stderr, stderr=sys.stderr)
    if not report.exists():
        context.fail("pytest", f"exit status {done.returncode}; the log has the reason")
        return
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    num_passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    context.row("Tests", passed=num_passed, **{name: counts[name] for name in ("failures", "errors", "skipped")})
    context.headline(f"{num_passed} passed, {counts['failures'] + counts['errors']} failed")
    for case in suite.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if skipped is not None:
            context.note(f"Skipped: `{name}`: {skipped.get('message')}")
        for kind in ("failure", "error"):
            element = case.find(kind)
            if element is not None:
                context.fail(name, re.sub(r"\x1b\[[0-9;]*m", "", element.text or "")[-_LARGEST_TRACEBACK:])
    if num_passed == 0:
        context.fail("pytest", "no test passed")
