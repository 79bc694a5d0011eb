"""Many dies on paper: how many replicas they make, and what bounds the tokens a second of all of them together.

Replicas of a whole recipe share requests and never talk to each other, so their throughputs add up until the hosts or
the network in front of them are full. A replica of more dies than a node has takes whole nodes; dies that make no whole
replica stay idle. Two of the hosts' figures are measured, on another kind of machine (docs/serving.md); all others, a
node's cores and network among them, are assumptions, and results name them as such. Nothing was tried on many nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from executor.capacity.chips import Chip
from executor.capacity.predict import Asked, Prediction

MEASURED_IN = "docs/serving.md"
"""The page that the measured figures are from: its section Measured. Two x86 cores; no host of a chip was asked."""
HTTP_TOKEN_S = 0.24e-3
"""Measured: of a core, for a streamed token over HTTP, 64 streams, server less engine."""
PICTURE_S, PICTURE_PIXELS = 25e-3, 1920 * 1088
"""Measured: of a core, for a JPEG of 1080p from its bytes to what travels to a device."""
JPEG_PIXEL_BYTES = 0.37
"""An assumption: that of the JPEG which was measured. Photographs have more and less."""
TEXT_TOKEN_BYTES = 4.0
"""An assumption: of a request's text."""
EVENT_BYTES = 300.0
"""An assumption: of a streamed token, an event of /v1/chat/completions with the frames around it."""
BASE64 = 4 / 3


@dataclass(frozen=True)
class Node:
    """A host with its dies: both numbers are assumptions. network_bytes_per_s: of the network that clients come by."""

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
    node: Node
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
    core_s = HTTP_TOKEN_S + pixels * PICTURE_S / PICTURE_PIXELS / workload.output_tokens  # of a token of an answer
    cores = max(0, node.cores - chip.dies_per_node)
    limits = {
        "chips": jobs * prediction.tokens_per_s,
        "hosts": nodes * cores / core_s,
        "network": nodes * node.network_bytes_per_s / _token_bytes(workload, pixels),
        "front_door": front_doors / HTTP_TOKEN_S,
    }
    return Installation(dies, nodes, jobs, dies - jobs * world_size, front_doors, node, limits)


def _token_bytes(workload: Asked, pixels: float) -> float:
    """That pass the network for a token of an answer: its event, and its share of the request."""
    text = workload.prompt_tokens * TEXT_TOKEN_BYTES
    return EVENT_BYTES + (text + pixels * JPEG_PIXEL_BYTES * BASE64) / workload.output_tokens


def measured() -> dict[str, float | str]:
    """Figures of the hosts' limits that were measured, in seconds of a core, and where that is written."""
    return {"http_token_s": HTTP_TOKEN_S, "picture_1080p_s": PICTURE_S, "source": MEASURED_IN}


def assumed(node: Node) -> dict[str, float]:
    """Figures that were not: what the limits of hosts and network rest on beside them."""
    return {
        "node_cores": node.cores,
        "cores_beside_each_die": 1,
        "node_network_bytes_per_s": node.network_bytes_per_s,
        "jpeg_bytes_per_pixel": JPEG_PIXEL_BYTES,
        "text_token_bytes": TEXT_TOKEN_BYTES,
        "streamed_token_bytes": EVENT_BYTES,
    }
