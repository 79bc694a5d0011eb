"""Many dies on paper: how many replicas they make, and what bounds the tokens a second of all of them together.

Replicas of a whole recipe share requests and never talk to each other, so their throughputs add up until the hosts or
the network in front of them are full. A replica of more dies than a node has takes whole nodes; dies that make no whole
replica stay idle. The hosts' figures are measured on another kind of machine (docs/serving.md), a node's cores and
network are assumed unless told: results say which of the limits it was. Nothing here was tried on many nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from executor.capacity.chips import Chip
from executor.capacity.predict import Asked, Prediction

HTTP_TOKEN_S = 0.24e-3
"""Of a core, for a streamed token over HTTP: docs/serving.md, Measured, 64 streams, server less engine."""
PICTURE_PIXEL_S = 25e-3 / (1920 * 1088)
"""Of a core, for a pixel from JPEG to patches: 25 ms for 1080p, what preprocessing is to keep to on one core."""
JPEG_PIXEL_BYTES = 0.25
"""Of a photograph as cameras and phones compress it: an assumption."""
BASE64 = 4 / 3
TEXT_TOKEN_BYTES = 4.0
EVENT_BYTES = 300.0
"""Of a streamed token: an event of /v1/chat/completions with its HTTP chunk, as the server writes it."""


@dataclass(frozen=True)
class Node:
    """A host with its dies: assumptions, unless told. network_bytes_per_s: of the network that clients come by."""

    cores: int = 192
    network_bytes_per_s: float = 25e9 / 8


@dataclass(frozen=True)
class Installation:
    """What `dies` give together. `limits`: tokens a second of answers that each resource alone would allow, by name.

    chips: the replicas' own. hosts: cores for HTTP and pictures, beside one a die. network: requests in, events out.
    front_door: one process that all tokens pass, as `serve` has it for replicas of one Ray cluster; a front door on
    each node and a balancer before them lift it, so it bounds only where `front_doors` is 1.
    """

    dies: int
    nodes: int
    replicas: int
    idle_dies: int
    front_doors: int
    limits: Mapping[str, float]

    @property
    def tokens_per_s(self) -> float:
        return min(self.limits.values())

    @property
    def bound_by(self) -> str:
        """The resource that is full first."""
        return min(self.limits, key=self.limits.__getitem__)


def replicas_of(dies: int, world_size: int, dies_per_node: int) -> int:
    """Jobs of `world_size` ranks on nodes that are full but for the last; jobs do not share dies across nodes."""
    nodes, rest = divmod(dies, dies_per_node)
    if world_size > dies_per_node:
        return nodes // -(-world_size // dies_per_node)
    return nodes * (dies_per_node // world_size) + rest // world_size


def install(
    dies: int,
    world_size: int,
    chip: Chip,
    workload: Asked,
    prediction: Prediction,
    token_side: int,
    node: Node | None = None,
    front_doors: int = 1,
) -> Installation:
    """`dies` as jobs of `world_size` ranks, each job as predicted. token_side: pixels of a visual token's side.

    `workload` is one job's: every job has as many users.
    """
    node = node or Node()
    nodes = -(-dies // chip.dies_per_node)
    jobs = replicas_of(dies, world_size, chip.dies_per_node)
    pixels = workload.pictures * workload.grid[0] * workload.grid[1] * token_side**2
    core_s = HTTP_TOKEN_S + pixels * PICTURE_PIXEL_S / workload.output_tokens  # of a token of an answer
    cores = max(0, node.cores - chip.dies_per_node)
    limits = {
        "chips": jobs * prediction.tokens_per_s,
        "hosts": nodes * cores / core_s,
        "network": nodes * node.network_bytes_per_s / _token_bytes(workload, pixels),
        "front_door": front_doors / HTTP_TOKEN_S,
    }
    return Installation(dies, nodes, jobs, dies - jobs * world_size, front_doors, limits)


def _token_bytes(workload: Asked, pixels: float) -> float:
    """That pass the network for a token of an answer: its event, and its share of the request."""
    text = workload.prompt_tokens * TEXT_TOKEN_BYTES
    return EVENT_BYTES + (text + pixels * JPEG_PIXEL_BYTES * BASE64) / workload.output_tokens
