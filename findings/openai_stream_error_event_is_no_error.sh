#!/usr/bin/env bash
# openai 3.57.0 (Python), responses.create(stream=True): the protocol's own `error` event, which has "type": "error" with code and
# message beside it, is handed over as one more event; only data with a key "error" raises APIError. Whoever reads text deltas
# takes a failed answer for a short one.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment openai==3.57.0

cat >"$folder/probe.py" <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai

DELTA = {"type": "response.output_text.delta", "delta": "Hel", "item_id": "m", "output_index": 0, "content_index": 0,
         "sequence_number": 0, "logprobs": []}
PLAIN = {"type": "error", "code": "server_error", "message": "it failed", "param": None, "sequence_number": 1}
BOTH = {**PLAIN, "error": {"message": "it failed", "type": "server_error", "code": "server_error", "param": None}}


class Stub(BaseHTTPRequestHandler):
    ending = PLAIN

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in (DELTA, self.ending):
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    def log_message(self, *arguments):
        pass


server = HTTPServer(("127.0.0.1", 0), Stub)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)


def seen(ending):
    Stub.ending = ending
    kinds = []
    try:
        for event in client.responses.create(model="m", input="hi", stream=True):
            kinds.append(event.type)
    except openai.APIError as error:
        kinds.append(f"{type(error).__name__}: {error.message}")
    return kinds


plain, both = seen(PLAIN), seen(BOTH)
print("an error event as the protocol has it:", plain)
print("the same with an object `error` in it:", both)
sys.exit(plain != ["response.output_text.delta", "error"] or both[-1] != "APIError: it failed")
PYTHON

"$python" "$folder/probe.py" && echo "as found: the protocol's error event raises nothing"
