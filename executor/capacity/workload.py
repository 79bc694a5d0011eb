"""What is asked of a deployment: how many requests at once, and how long each is. Knows no chip.

A visual token is a square of merged patches; a picture takes the area that the resize of the processors gives it
(executor/media/image.py), and two marks around it.
"""

from dataclasses import dataclass

from executor.errors import UserError
from executor.media.image import check_aspect_ratio, smart_resize
from executor.recipe.on_paper import OnPaper

MARKS = 2  # tokens before and behind a picture


@dataclass(frozen=True)
class Workload:
    """`users` requests at once, each of `pictures` pictures of `grid` visual tokens (rows, columns), `text_tokens` of
    text, and an answer of `output_tokens`."""

    users: int
    text_tokens: int
    pictures: int
    grid: tuple[int, int]
    output_tokens: int

    @property
    def picture_tokens(self) -> int:
        """Visual tokens of one picture."""
        return self.grid[0] * self.grid[1]

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + self.pictures * (self.picture_tokens + MARKS)

    @property
    def request_tokens(self) -> int:
        """Of prompt and answer."""
        return self.prompt_tokens + self.output_tokens

    def users_of_replica(self, replicas: int) -> int:
        """Of the replica that has the most of them."""
        return -(-self.users // replicas)


def picture_grid(paper: OnPaper, width: int, height: int) -> tuple[int, int]:
    """(rows, columns) of the visual tokens of a picture of so many pixels. UserError for one that is too narrow."""
    side = paper.token_side
    try:
        check_aspect_ratio(height, width)
    except UserError as error:
        raise UserError(f"plan_config.picture_size: {error}") from error
    rows, columns = smart_resize(height, width, side, *paper.pixels)
    return rows // side, columns // side


def asked_workload(paper: OnPaper) -> Workload:
    """What the recipe's plan_config asks about."""
    plan = paper.recipe.plan
    grid = picture_grid(paper, *plan.picture_size)
    users = plan.users or paper.recipe.scheduler.max_num_seqs * replicas_of(paper)
    return Workload(users, plan.input_tokens, plan.pictures, grid, plan.output_tokens)


def replicas_of(paper: OnPaper) -> int:
    """Copies of the model that the recipe's ranks make."""
    return paper.recipe.parallel.world_size // paper.recipe.attn_tp_size
