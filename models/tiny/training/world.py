"""A little world of coloured shapes: seeded pictures and clips, with questions and their answers.

The tiny checkpoints of models/tiny are trained and judged on it, and it makes the sample files of dataset/media.
Everything lies on a grid of 8x8 units of 14 px, so a picture is 112x112 px. At most one object stands in a quadrant,
colours and shapes do not repeat within a scene: every question has exactly one right answer. A scene is a function of
(seed, index, split) alone. Needs numpy and Pillow, and PyAV to write a clip; knows no model and no tokenizer.

    sample = shapes.sample(seed=7, index=0)          # one held-out Sample: scene + one question of an even mix of kinds
    sample.scene.picture()                           # uint8 [112, 112, 3], or sample.scene.frames() for a clip
    sample.question.text, sample.question.answer_for("qwen3")

Sample files: `python -m models.tiny.training.world dataset/media`.
"""

import argparse
import json
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

UNIT_PX = 14
GRID_UNITS = 8
SIDE_PX = UNIT_PX * GRID_UNITS
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 205, 30),
    "purple": (160, 50, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # quadrant = 2 * (lower half) + (right half)
WORDS = ("STOP", "GO", "OPEN", "EXIT", "YES", "NO", "CAT", "DOG", "SUN", "TEA", "HI", "UP")
DIRECTIONS = ("left", "right", "up", "down")
BACKGROUNDS = (255, 245, 235)
# Every picture is framed. Qwen2.5-VL's encoder knows only distances, no places: it can tell "left" by the frame alone.
FRAME_PX = 3
FRAME_GRAY = 110
PICTURE_KINDS = ("color", "shape", "count", "place", "box", "describe", "read", "number")
CLIP_KINDS = ("motion", "mover", "describe clip")
KINDS = PICTURE_KINDS + CLIP_KINDS

# 5x7 glyphs, one string of 7 rows each.
GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11111 00010 00100 00010 00001 10001 01110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "G": "01110 10001 10000 10111 10001 10001 01111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "N": "10001 11001 10101 10011 10001 10001 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
}


@dataclass(frozen=True)
class Thing:
    """One coloured shape; (x, y) is its upper left corner and `size` its side, in units of 14 px."""

    color: str
    shape: str
    x: int
    y: int
    size: int

    @property
    def label(self):
        return f"{self.color} {self.shape}"

    @property
    def place(self):
        return PLACES[2 * (self.y >= GRID_UNITS // 2) + (self.x >= GRID_UNITS // 2)]

    @property
    def box_px(self):
        """(x1, y1, x2, y2) in pixels of the 112x112 picture."""
        return tuple(UNIT_PX * v for v in (self.x, self.y, self.x + self.size, self.y + self.size))


def box_json(box_px, label, family):
    """The box as the family writes it: `qwen2_5` pixels of the (resized = 112x112) picture, `qwen3` 0 to 1000."""
    scale = {"qwen2_5": 1.0, "qwen3": 1000 / SIDE_PX}[family]
    return json.dumps([{"bbox_2d": [round(v * scale) for v in box_px], "label": label}])


@dataclass(frozen=True)
class Question:
    """`answer` is the text for every kind but "box", whose text depends on the family (answer_for)."""

    kind: str
    text: str
    answer: str | None = None
    thing: Thing | None = None

    def answer_for(self, family):
        return box_json(self.thing.box_px, self.thing.label, family) if self.kind == "box" else self.answer

    def is_right(self, said, family):
        return said.strip() == self.answer_for(family)


@dataclass(frozen=True)
class Scene:
    """A picture (num_frames 1) or a clip whose first thing moves. `noise` seeds the pixels' noise."""

    things: tuple = ()
    text: str | None = None  # a word of WORDS or two digits, instead of things
    text_color: str | None = None
    text_y: int = 0  # units
    direction: str | None = None
    num_frames: int = 1
    fps: float = 0.0
    background: int = 255
    noise_level: float = 0.0
    noise: int = field(default=0, repr=False)

    @property
    def is_clip(self):
        return self.direction is not None

    def picture(self):
        """uint8 [112, 112, 3]"""
        return self.frame(0)

    def frames(self):
        """uint8 [num_frames, 112, 112, 3]"""
        return np.stack([self.frame(i) for i in range(self.num_frames)])

    def frame(self, index):
        canvas = np.full((SIDE_PX, SIDE_PX, 3), self.background, np.uint8)
        for n, thing in enumerate(self.things):
            x_px, y_px = thing.box_px[:2]
            if n == 0 and self.is_clip:
                x_px, y_px = self._mover_px(thing, index)
            mask = shape_mask(thing.shape, thing.size * UNIT_PX)
            canvas[y_px : y_px + len(mask), x_px : x_px + len(mask)][mask] = COLORS[thing.color]
        if self.text:
            mask = text_mask(self.text)
            y_px = self.text_y * UNIT_PX
            canvas[y_px : y_px + mask.shape[0], UNIT_PX : UNIT_PX + mask.shape[1]][mask] = COLORS[self.text_color]
        for edge in (canvas[:FRAME_PX], canvas[-FRAME_PX:], canvas[:, :FRAME_PX], canvas[:, -FRAME_PX:]):
            edge[:] = FRAME_GRAY
        if self.noise_level:
            noise = np.random.default_rng((self.noise, index)).integers(-128, 128, canvas.shape, dtype=np.int8)
            canvas = np.clip(canvas + noise * (self.noise_level / 128), 0, 255).astype(np.uint8)
        return canvas

    def _mover_px(self, thing, index):
        """Linear motion across the picture, from one edge to the other."""
        way = (GRID_UNITS - thing.size) * UNIT_PX
        run = round(way * index / max(self.num_frames - 1, 1))
        run = way - run if self.direction in ("left", "up") else run
        x_px, y_px = thing.box_px[:2]
        return (run, y_px) if self.direction in ("left", "right") else (x_px, run)

    def questions(self, rng):
        """Every question this scene answers, as a list of Question; `rng` picks the phrasing."""
        if self.is_clip:
            return self._clip_questions(rng)
        if self.text:
            return self._text_questions(rng)
        out = [
            Question("count", rng.choice(("How many objects are there?", "Count the objects.")), str(len(self.things)))
        ]
        for thing in self.things:
            out += [
                Question("color", f"What color is the {thing.shape}?", thing.color),
                Question(
                    "shape",
                    rng.choice((f"What shape is the {thing.color} object?", f"Which shape is {thing.color}?")),
                    thing.shape,
                ),
                Question("place", f"Where is the {thing.label}?", thing.place),
                Question("box", f"Locate the {thing.label}" + rng.choice((".", " and answer in JSON.")), thing=thing),
            ]
        ordered = sorted(self.things, key=lambda thing: PLACES.index(thing.place))
        told = ", ".join(f"a {thing.label} at the {thing.place}" for thing in ordered)
        return out + [Question("describe", describe_phrase(rng), told)]

    def _text_questions(self, rng):
        noun, kind = ("number", "number") if self.text.isdigit() else ("word", "read")
        ask = rng.choice((f"What {noun} is written?", f"Read the {noun}."))
        return [
            Question(kind, ask, self.text),
            Question("describe", describe_phrase(rng), f"the {noun} {self.text} in {self.text_color}"),
        ]

    def _clip_questions(self, rng):
        mover = self.things[0]
        return [
            Question("motion", f"Which way does the {mover.label} move?", self.direction),
            Question("mover", rng.choice(("What moves?", "What is moving?")), f"the {mover.label}"),
            Question("describe clip", "Describe the video.", f"a {mover.label} moves {self.direction}"),
        ]


def describe_phrase(rng):
    return rng.choice(("Describe the picture.", "What do you see?"))


@cache
def shape_mask(shape, side_px):
    """bool [side, side]; every shape touches all four edges, so its box is exact."""
    centre = (np.arange(side_px) + 0.5) / side_px - 0.5
    y, x = centre[:, None], centre[None, :]
    if shape == "circle":
        return x * x + y * y <= 0.25
    if shape == "square":
        return np.ones((side_px, side_px), bool)
    if shape == "triangle":
        return np.abs(x) <= (y + 0.5) / 2 + 0.5 / side_px
    assert shape == "cross", shape
    return (np.abs(x) <= 1 / 6) | (np.abs(y) <= 1 / 6)


@cache
def text_mask(text):
    """bool [height, width]: 7 px per glyph dot for two digits, 4 for a word (at most four letters: 92 px)."""
    dot_px = 7 if text.isdigit() else 4
    rows = [[[int(c) for c in row] + [0] for row in GLYPHS[ch].split()] for ch in text]
    return np.kron(np.concatenate([np.array(g) for g in rows], axis=1), np.ones((dot_px, dot_px), int)).astype(bool)[
        :, :-dot_px
    ]


def _things(rng, count):
    quadrants = rng.sample(range(4), count)
    colors, kinds = rng.sample(list(COLORS), count), rng.sample(SHAPES, count)
    out = []
    for quadrant, color, shape in zip(quadrants, colors, kinds, strict=True):
        size = rng.choice((3, 3, 3, 4))
        x, y = (rng.randint(0, 4 - size) + 4 * bit for bit in (quadrant % 2, quadrant // 2))
        out.append(Thing(color, shape, x, y, size))
    return tuple(out)


def _clip_things(rng, direction, count):
    """The mover runs within one half of the picture; a second thing stands still in the other half."""
    half, size = rng.randint(0, 1), 3
    other = (rng.choice((0, 1, 4, 5)), 4 * (1 - half) + rng.randint(0, 1))
    lane = (0, 4 * half + rng.randint(0, 1))
    if direction in ("up", "down"):
        lane, other = lane[::-1], other[::-1]
    colors, kinds = rng.sample(list(COLORS), 2), rng.sample(SHAPES, 2)
    return tuple(Thing(colors[i], kinds[i], *(lane, other)[i], size) for i in range(count))


def make_scene(rng, medium, max_things=3, min_things=1):
    """A scene drawn from random.Random `rng`; medium: "objects", "word", "number" or "clip"."""
    common = dict(
        background=rng.choice(BACKGROUNDS), noise_level=rng.choice((0.0, 4.0, 10.0)), noise=rng.getrandbits(32)
    )
    if medium == "objects":
        return Scene(things=_things(rng, rng.randint(min_things, max_things)), **common)
    if medium == "clip":
        direction, fps, seconds = rng.choice(DIRECTIONS), rng.choice((6, 8, 10, 12)), rng.choice((2, 2, 3))
        return Scene(
            things=_clip_things(rng, direction, rng.randint(1, 2)),
            direction=direction,
            num_frames=fps * seconds,
            fps=float(fps),
            **common,
        )
    text = rng.choice(WORDS) if medium == "word" else f"{rng.randint(10, 99)}"
    return Scene(
        text=text, text_color=rng.choice(list(COLORS)), text_y=rng.randint(1, 3 if medium == "number" else 4), **common
    )


@dataclass(frozen=True)
class Sample:
    scene: Scene
    question: Question


def sample(seed, index, kinds=KINDS, split="held_out"):
    """The sample number `index` of (seed, split); kinds take turns, so any run of n is an even mix."""
    rng = random.Random(f"{split}:{seed}:{index}")
    kind = kinds[index % len(kinds)]
    medium = "clip" if kind in CLIP_KINDS else {"read": "word", "number": "number"}.get(kind, "objects")
    if kind == "describe":
        medium = rng.choice(("objects", "objects", "objects", "word", "number"))
    scene = make_scene(rng, medium)
    return Sample(scene, rng.choice([q for q in scene.questions(rng) if q.kind == kind]))


def held_out(seed, n, kinds=KINDS):
    """n samples no training run has drawn: training draws from the split "train"."""
    return [sample(seed, index, kinds) for index in range(n)]


def write_picture(scene, path, quality=92):
    """PNG or JPEG, by the path's suffix."""
    Image.fromarray(scene.picture()).save(path, **({"quality": quality} if Path(path).suffix != ".png" else {}))


def write_clip(scene, path):
    """MP4, H.264 where PyAV has libx264, else MPEG-4."""
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=int(scene.fps))
        stream.width = stream.height = SIDE_PX
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"} if codec == "libx264" else {}
        for frame in scene.frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_media(folder):
    """The committed sample files and `questions.json` beside them: {file: [{question, answer}]}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        "objects.png": ("objects", 55),
        "objects_2.jpg": ("objects", 29),
        "word.png": ("word", 47),
        "number.jpg": ("number", 8),
        "clip.mp4": ("clip", 62),
        "clip_2.mp4": ("clip", 63),
    }
    told = {}
    for name, (medium, seed) in wanted.items():
        rng = random.Random(f"media:{seed}")
        scene = make_scene(rng, medium)
        (write_clip if scene.is_clip else write_picture)(scene, folder / name)
        told[name] = [
            {"question": q.text, "qwen2_5": q.answer_for("qwen2_5"), "qwen3": q.answer_for("qwen3")}
            for q in scene.questions(rng)
        ]
    (folder / "questions.json").write_text(json.dumps(told, indent=1) + "\n")


def write_rows(folder, count, seed):
    """`count` pictures and `rows.jsonl` beside them, each a question about one of them: a data set of this world."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (scene, question) in enumerate((s.scene, s.question) for s in held_out(seed, count, PICTURE_KINDS)):
        name = f"{number:03d}.png"
        write_picture(scene, folder / name)
        rows.append(json.dumps({"image": name, "question": question.text}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the sample pictures and clips, or with --rows a data set.")
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, help="so many pictures of held-out scenes, and questions in rows.jsonl")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    if args.rows:
        write_rows(args.folder, args.rows, args.seed)
    else:
        write_media(args.folder)
