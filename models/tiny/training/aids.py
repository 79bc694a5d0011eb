"""Aids of training that no checkpoint keeps: they say early what answers alone would teach late, if ever.

Qwen2.5's tiny model learns at once what a picture shows and where, but not to look a named thing up among two or three
(`--aids` turns the probe and the look loss on). Cells are the 16 vision tokens of a picture, row-major 4x4.
"""

import numpy as np
import torch
import torch.nn.functional as F

from models.tiny.training import world as shapes

NUM_CELLS = 16
CELLS_PER_ROW = 4
CELL_FACTS = {"color": 6, "shape": 4, "x1": 9, "y1": 9, "x2": 9, "y2": 9, "row": 4, "column": 4}  # classes of each
LOOK_LAYER = 1  # the text layer whose head 0 is told where to look
PROBE_WEIGHT = 0.2
LOOK_WEIGHT = 0.3
NAMED_BY = {
    "color": lambda thing: thing.shape,
    "shape": lambda thing: thing.color,
    "place": lambda thing: thing.label,
    "box": lambda thing: thing.label,
}


def covered_units(thing, cell):
    """How many of the cell's 2x2 units lie in the thing's box."""
    row, column = divmod(cell, CELLS_PER_ROW)
    width = min(thing.x + thing.size, 2 * column + 2) - max(thing.x, 2 * column)
    height = min(thing.y + thing.size, 2 * row + 2) - max(thing.y, 2 * row)
    return max(width, 0) * max(height, 0)


def drills(scene, rng):
    """Turns of training alone, one per thing: looked up by colour or by shape, answered by all there is to tell."""
    return [
        shapes.Question(
            "drill",
            f"What about the {rng.choice((thing.color + ' object', thing.shape))}?",
            f"the {thing.label} is at the {thing.place}",
        )
        for thing in scene.things
        if not scene.is_clip
    ]


def cell_facts(scene):
    """int64 [16, 8] in the order of CELL_FACTS: color, shape and box of the thing that covers most of a cell, and the
    cell's own row and column; -100 where there is nothing to tell (clips, empty cells)."""
    facts = np.full((NUM_CELLS, len(CELL_FACTS)), -100)
    for cell in range(0 if scene.is_clip else NUM_CELLS):
        facts[cell, 6:] = divmod(cell, CELLS_PER_ROW)
        covered = [covered_units(thing, cell) for thing in scene.things]
        if covered and max(covered):
            thing = scene.things[covered.index(max(covered))]
            facts[cell, :2] = list(shapes.COLORS).index(thing.color), shapes.SHAPES.index(thing.shape)
            facts[cell, 2:6] = [value // shapes.UNIT_PX for value in thing.box_px]
    return facts


def looked_at(question, scene):
    """float32 [16]: 1 for the cells (at least half covered) of the thing a question of a picture names, else 0."""
    cells = np.zeros(NUM_CELLS, np.float32)
    if question.kind in NAMED_BY and not scene.is_clip:
        for thing in scene.things:
            if NAMED_BY[question.kind](thing) in question.text:
                cells += [covered_units(thing, cell) >= 2 for cell in range(NUM_CELLS)]
    return cells


class Probe(torch.nn.Linear):
    """Reads CELL_FACTS off the vision tokens: the encoder learns to say what is where."""

    def __init__(self, width):
        super().__init__(width, sum(CELL_FACTS.values()))

    def loss(self, merged, facts):
        """merged [16N, H], facts int64 [16N, 8] to the mean cross entropy."""
        logits = self(F.layer_norm(merged.float(), merged.shape[-1:])).split(list(CELL_FACTS.values()), dim=-1)
        losses = [F.cross_entropy(part.float(), fact) for part, fact in zip(logits, facts.T, strict=True)]
        return sum(losses) / len(losses)


def look_loss(attended, look, first_vision):
    """-log of the attention paid to the cells a question asks about. attended: log probabilities [B, T, T], look 0 or 1
    [B, T, 16] (all 0 where nothing is looked up), first_vision [B] the place of a sequence's first vision token."""
    rows = look.sum(-1) > 0
    at = (first_vision[:, None] + torch.arange(NUM_CELLS))[:, None, :].expand(-1, look.shape[1], -1)
    paid = attended.gather(2, at)[rows]
    return -torch.logsumexp(paid.masked_fill(look[rows] == 0, float("-inf")), -1).mean()
