"""Mistakes in a recipe to be served that can be told at once: before torch is read from disk, and any checkpoint.

Imports nothing heavy. Everything here is checked again where it is used.
"""

import importlib.util

from executor.cluster.ray_install import missing_ray
from executor.media.hosts import DOMAINS_KEY, PRIVATE_KEY, parse_rules
from executor.media.local import Folder
from executor.recipe.schema import Recipe
from executor.serve.listener import check_settings, listen


def check_mistakes(recipe: Recipe, *, listens: bool) -> None:
    """Raises UserError. `listens`: this very machine is the one that has the address."""
    server, data = recipe.server, recipe.data
    check_settings(server)
    if server.allowed_local_media_path is not None:
        Folder.at(server.allowed_local_media_path)
    parse_rules(data.allowed_media_domains, DOMAINS_KEY)
    parse_rules(data.allowed_private_hosts, PRIVATE_KEY)
    if recipe.num_jobs("serve") > 1 and importlib.util.find_spec("ray") is None:
        raise missing_ray("No module named 'ray'")
    if listens:
        listen(server).close()
