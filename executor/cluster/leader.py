"""What a leader of a job that a cluster has started knows of its front door, and says there of itself."""

from collections.abc import Mapping
from typing import Any

from executor.host.env import code_digest
from executor.recipe.schema import Recipe
from executor.serve.gate import Front


def front_and_hello(recipe: Recipe, parallel: Any, variables: Mapping[str, str]) -> tuple[Front, dict[str, Any]]:
    """`recipe`: as it is settled here. `parallel`: this rank's place. `variables`: the environment, where
    executor.cluster.jobs has put the front door and the job's number."""
    hello = {
        "replica": int(variables["RECIPE_REPLICA"]),
        "leader": parallel.replicas.rank,
        "leaders": parallel.replicas.size,
        "code": code_digest(),
        "recipe": recipe.model_dump(mode="json", by_alias=True),
    }
    return Front.from_text(variables["RECIPE_FRONT"]), hello
