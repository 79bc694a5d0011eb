"""server_config before and at the start: certificates, origins, addresses, and the lines that are told."""

import json
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from executor.engine.engine import Engine
from executor.errors import UserError
from executor.recipe.schema import ServerSection
from executor.serve.listener import check_settings, listen
from executor.serve.settings import greeting, url_of
from tests.reference import REPO
from tests.serve.conftest import start
from tests.serve.test_errors import CHAT, MESSAGES


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, made here, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem"
    words += " -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(words.split(), cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def test_the_curl_line_works_as_printed(tiny_engine: Engine, certificate: tuple[Path, Path]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    cert, key = map(str, certificate)
    variants: list[dict[str, Any]] = [
        {"served_model_name": 'it\'s a "name"'},
        {"api_key": "a key $(of) 1"},
        {"ssl_certfile": cert, "ssl_keyfile": key},
    ]
    for fields in variants:
        with start(tiny_engine, **fields) as running:
            lines = list(greeting(running.service, int(running.url.rsplit(":", 1)[1])))
            assert not any(is_warning for _, is_warning in lines)
            line = next(words for words, _ in lines if words.startswith("to try")).partition(": curl ")[2]
            environment = {"API_KEY": fields.get("api_key", ""), "PATH": "/usr/bin:/bin"}
            done = subprocess.run(["sh", "-c", f"curl {line}"], env=environment, capture_output=True)
            assert json.loads(done.stdout)["choices"][0]["message"]["content"], done
            if "ssl_certfile" in fields:
                assert running.url.startswith("https://127.0.0.1:")
                with httpx.Client(base_url=running.url, verify=ssl.create_default_context(cafile=cert)) as client:
                    assert client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1}).status_code == 200


def test_certificates_that_cannot_be_used_are_refused_before_the_model_is_loaded(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = map(str, certificate)
    (tmp_path / "no.pem").write_text("no certificate")
    for fields, words in (
        ({"ssl_keyfile": key}, "without ssl_certfile"),
        ({"ssl_certfile": str(tmp_path / "none.pem")}, "there is no file"),
        ({"ssl_certfile": cert}, "cannot be used"),
        ({"ssl_certfile": str(tmp_path / "no.pem"), "ssl_keyfile": key}, "cannot be used"),
    ):
        with pytest.raises(UserError, match=words):
            check_settings(ServerSection(**fields))


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "a.example", "http://a.example/chat", "", "http://", "null", "*.example"]
)
def test_origins_that_no_browser_sends_are_refused(origin: str) -> None:
    with pytest.raises(UserError, match="allowed_origins"):
        check_settings(ServerSection(allowed_origins=(origin,)))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4", "a\0b", "127.0.0.1:80", "é" * 80])
def test_addresses_that_cannot_be_had_are_refused(host: str) -> None:
    with pytest.raises(UserError, match="cannot be listened on"):
        listen(ServerSection(host=host, port=0))


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"),
     ("::1", "http://[::1]:80"), ("localhost", "http://localhost:80"), ("10.0.0.5", "http://10.0.0.5:80")],
)  # fmt: skip
def test_the_address_that_is_told_is_one_to_reach(host: str, url: str) -> None:
    assert url_of(ServerSection(host=host), 80) == url


def test_what_is_told_at_the_start(tiny_engine: Engine) -> None:
    with start(tiny_engine, host="0.0.0.0") as running:
        lines = list(greeting(running.service, 80))
        defaults = next(words for words, _ in lines if "do not say otherwise" in words)
        assert "temperature 0" in defaults and "up to the context's end (2048 tokens)" in defaults
        (warning,) = [words for words, is_warning in lines if is_warning]
        assert "0.0.0.0:80" in warning and "api_key" in warning


def test_mistakes_are_told_without_heavy_imports(tmp_path: Path) -> None:
    """A process of its own: which modules it has imported is what is tested."""
    code = """if True:
        import sys
        from executor.commands.serve.mistakes import check_mistakes
        from executor.errors import UserError
        from executor.recipe.schema import load_recipe
        for override in sys.argv[1:]:
            try:
                check_mistakes(load_recipe("config/quickstart.yaml", [override]), listens=True)
            except UserError as error:
                print(error)
        print({"torch", "transformers", "fastapi", "uvicorn"} & sys.modules.keys())
    """
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        wrong = {
            f"server_config.port={other.getsockname()[1]}": "cannot be listened on (Address already in use)",
            "server_config.host=no.such.host.invalid": "cannot be listened on",
            "server_config.ssl_certfile=/no/such": "server_config.ssl_certfile: there is no file",
            "server_config.allowed_local_media_path=/no/such": "/no/such: no such folder",
            "data_config.allowed_media_domains=[https://x.org]": "'https://x.org' is no host",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *wrong], capture_output=True, text=True, cwd=REPO, check=True
        )
    *lines, heavy = done.stdout.splitlines()
    assert len(lines) == len(wrong) and heavy == "set()"
    assert all(words in line for words, line in zip(wrong.values(), lines, strict=True))
