"""`dataset: tiny_world`: questions about the little world that the tiny checkpoints were trained on.

Drawn as they are asked, from held-out pictures and clips: random_seed decides all of them, and `limit` how many there
are. Kinds of questions take turns, and scores are broken down by `kind`. Boxes are those of the picture, so that both
families are scored alike.
"""

import io
from functools import partial

import av
from PIL import Image

from dataset.sample import Dataset, Sample
from executor.host.env import REPO_ROOT
from executor.recipe.schema import DataSection
from models.tiny.training import world

NUM_SAMPLES = 500  # where data_config.limit does not say it


def load(data: DataSection) -> Dataset:
    """`limit` samples of the seed."""
    indices = range(data.limit or NUM_SAMPLES)
    return Dataset(REPO_ROOT, [partial(draw, data.random_seed, index) for index in indices])


def draw(seed: int, index: int) -> Sample:
    """Sample `index` of a seed; equal for equal arguments."""
    drawn = world.sample(seed, index)
    asked = drawn.question
    part = {"type": "video", "video": clip(drawn.scene)} if drawn.scene.is_clip else _picture_part(drawn.scene)
    boxes = ()
    if asked.thing is not None and asked.kind == "box":
        boxes = (tuple(value / world.SIDE_PX for value in asked.thing.box_px),)
    return Sample(
        f"tiny_world {index}",
        ({"role": "user", "content": [part, {"type": "text", "text": asked.text}]},),
        references=() if boxes else (asked.answer,),
        boxes=boxes,
        labels={"kind": asked.kind},
    )


def clip(scene: world.Scene) -> bytes:
    """A scene as the bytes of a MOV. Its frames are PNGs: H.264 encoders give other bytes each time, and a run is
    resumed by what was asked."""
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as container:
        stream = container.add_stream("png", rate=int(scene.fps))
        stream.width = stream.height = world.SIDE_PX
        stream.pix_fmt = "rgb24"
        for frame in scene.frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _picture_part(scene: world.Scene) -> dict[str, object]:
    file = io.BytesIO()
    Image.fromarray(scene.picture()).save(file, "PNG")
    return {"type": "image", "image": file.getvalue()}
