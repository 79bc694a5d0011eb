"""GET /v1/models, /health, /ping, /version: what clients ask before they ask anything."""

from pathlib import Path

from transformers import AutoTokenizer

from tests.serve.conftest import TINY, Running


def test_the_cards_root_is_a_tokenizers_folder(server: Running) -> None:
    listed = server.http.get("/v1/models").json()
    card = listed["data"][0]
    assert listed["object"] == "list" and card["id"] == TINY.name and card["max_model_len"] == 2048
    assert Path(card["root"]).is_absolute() and len(AutoTokenizer.from_pretrained(card["root"])) > 0
    assert server.http.get(f"/v1/models/{TINY.name}").json() == card
    reply = server.http.get("/v1/models/some/other")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"


def test_a_server_that_answers_says_so(server: Running) -> None:
    for reply in (server.http.get("/health"), server.http.get("/ping"), server.http.post("/ping")):
        assert reply.status_code == 200 and reply.content == b""
    assert server.http.get("/version").json()["version"]
    server.service.is_ready = False
    try:
        assert server.http.get("/health").status_code == 503
    finally:
        server.service.is_ready = True
