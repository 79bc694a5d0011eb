"""server_config at the start: what a user wants to know is told."""

import ipaddress
import json
import shlex
from collections.abc import Iterator

from executor.recipe.schema import ServerSection
from executor.schedule.request import SamplingParams
from executor.serve.service import Service

QUESTION = "What is a square?"
DEFAULTS = SamplingParams()
SHOWN = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "n",
)  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(settings: ServerSection, port: int) -> str:
    """Where this machine reaches the server."""
    host = settings.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        if address.is_unspecified:
            host = "127.0.0.1" if address.version == 4 else "::1"
        if address.version == 6:
            host = f"[{host}]"
    return f"{'https' if settings.ssl_certfile else 'http'}://{host}:{port}"


def curl_line(service: Service, url: str) -> str:
    """A first request, as a shell takes it."""
    settings = service.recipe.server
    body = {
        "model": service.model_name,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": min(32, service.max_model_len // 2),
    }
    words = ["curl", "-s", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    if settings.ssl_certfile:
        words.insert(1, "-k")  # the certificate's name need not be this machine's address
    line = shlex.join(words)
    if settings.api_key:
        line += ' -H "Authorization: Bearer $API_KEY"'
    return f"{line} -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def greeting(service: Service, port: int) -> Iterator[tuple[str, bool]]:
    """The lines to log at the start, each with whether it is a warning."""
    settings = service.recipe.server
    url = url_of(settings, port)
    where = "" if is_loopback(settings.host) else f" (listening on {settings.host})"
    yield f"serving {service.model_name} at {url}{where}; the chat page is {url}/", False
    yield f"requests that do not say otherwise: {defaults_of(service)}", False
    hint = " (API_KEY: the recipe's server_config.api_key)" if settings.api_key else ""
    yield f"to try{hint}: {curl_line(service, url)}", False
    if not settings.api_key and not is_loopback(settings.host):
        yield (
            f"whoever reaches {settings.host}:{port} may use this server: server_config.api_key is not set; set it, or "
            "listen on 127.0.0.1",
            True,
        )


def defaults_of(service: Service) -> str:
    """How answers are chosen where a request says nothing: the recipe's values, then the checkpoint's."""
    params = service.params({})
    values = {name: getattr(params, name) for name in SHOWN}
    said = [f"{name} {value}" for name, value in values.items() if value != getattr(DEFAULTS, name)]
    if not params.temperature:
        said.insert(0, "temperature 0 (the likeliest token)")
    most = service.recipe.generation.max_new_tokens
    said.append(f"at most {most} tokens" if most else f"up to the context's end ({service.max_model_len} tokens)")
    return ", ".join(said)
