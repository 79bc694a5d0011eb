# /// script
# requires-python = ">=3.11"
# dependencies = ["schemathesis==4.32.5"]
# ///
"""schemathesis against the server's own /openapi.json: no generated request is answered with a 5xx; two minutes."""

import json
import re
import sys
import tempfile
import urllib.request
from pathlib import Path

from commands import run

url = sys.argv[1]
described = json.load(urllib.request.urlopen(f"{url}/openapi.json"))
num_operations = sum(len(methods) for methods in described["paths"].values())
with tempfile.TemporaryDirectory() as home:
    words = ("--phases", "examples,coverage,fuzzing", "--max-examples", 15, "--max-time", 120, "--seed", 7)
    output = run(
        "st", "run", f"{url}/openapi.json", "--checks", "not_a_server_error", *words, "--request-timeout", 60,
        "--continue-on-failure", "--no-color", folder=Path(home),
    )  # fmt: skip
tested = int(re.search(r"Tested: (\d+)", output)[1])
generated, passed = map(int, re.search(r"(\d+) generated, (\d+) passed", output).groups())
assert tested == num_operations and generated == passed >= 100, output
assert urllib.request.urlopen(f"{url}/health").status == 200
print(f"{tested} operations, {generated} requests, none with a 5xx")
