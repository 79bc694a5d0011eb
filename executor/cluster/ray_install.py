"""What to do where Ray is not installed."""

import sys

from executor.errors import UserError
from executor.host.env import REPO_ROOT

INSTALL = f"{sys.executable} -m pip install -r {REPO_ROOT / 'requirements-ray.txt'}"


def missing_ray(reason: str) -> UserError:
    return UserError(
        f"server_config.replicas and parallel_config.ray_jobs need Ray ({reason}); install it on every node of the "
        f"cluster: {INSTALL}"
    )
