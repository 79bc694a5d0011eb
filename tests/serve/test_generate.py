"""POST /generate: MindIE's form, with the bodies that its documents send."""

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from models.tiny.training.world import random_scene, render
from tests.serve.conftest import Running


def post(server: Running, **body: Any) -> list[str]:
    reply = server.http.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["text"]
