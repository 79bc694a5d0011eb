"""The age of a process, from the system's own account."""

import subprocess
import sys

from executor.host.uptime import process_age_s

CODE = """
import time
from executor.host.uptime import process_age_s
print(process_age_s())
time.sleep(0.3)
print(process_age_s())
"""


def test_a_young_process_is_younger_than_this_one():
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60).stdout
    first, second = map(float, said.split())
    assert first >= 0 and 0.2 < second - first < process_age_s()
