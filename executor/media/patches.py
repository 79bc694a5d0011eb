"""Pixels into patches, normalised: the last thing that happens to media before the encoder.

Invariants: pure functions; pixels stay uint8 until they are cut; every value equals, bit for bit, that of transformers'
default processors of Qwen2-VL and Qwen3-VL. Means and patch sizes are the caller's; nothing here knows a model.
Legend: F frames, C channels (3), H/W pixels, P patches, N patches of a frame, tp temporal patch size, ps patch size,
m merge size.
"""

from collections.abc import Sequence

import numpy as np
import torch

_SLAB_PATCHES = 256  # of a CPU, turned into numbers at a time: they stay in its cache


def repeat_last(frames: torch.Tensor, multiple: int) -> torch.Tensor:
    """[F, ...] with the last frame repeated until F is a multiple: a picture, or a video of an odd count."""
    missing = -frames.shape[0] % multiple
    if missing == 0:
        return frames
    return torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])])


def normalize_patchify(
    frames: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    dtype: torch.dtype = torch.float32,
    rescale_factor: float = 1 / 255,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """uint8 [F, 3, H, W] to [P, 3 * tp * ps * ps] of `dtype`, on the frames' device; H, W multiples of ps * m.

    P runs over (time, row of merge windows, column of them, row in the window, column in it); in a patch (C, tp, row,
    column). Cut as bytes and only then turned into numbers: a quarter of the traffic, the same values. Computed in
    fp32 and cast once. `out`: contiguous, of that shape and `dtype`, to be filled instead of new memory.
    """
    num_frames, channels, height, width = frames.shape
    steps, per_frame = -(-num_frames // temporal_patch_size), height // patch_size * (width // patch_size)
    values = (channels, temporal_patch_size, patch_size * patch_size)
    if out is None:
        out = torch.empty(steps * per_frame, channels * values[1] * values[2], dtype=dtype, device=frames.device)
    by_step = out.view(steps, per_frame, *values)
    # transformers folds the rescale into mean and std; any other order of these operations rounds differently.
    means = (torch.tensor(mean, device=frames.device) * (1.0 / rescale_factor)).view(-1, 1)
    stds = (torch.tensor(std, device=frames.device) * (1.0 / rescale_factor)).view(-1, 1)
    if frames.device.type == "cpu":
        _fill_from_bytes(by_step, cut_rows(frames, patch_size, merge_size), means, stds)
    else:
        patches = cut_frames(repeat_last(frames, temporal_patch_size), patch_size, temporal_patch_size, merge_size)
        patches = patches.to(torch.float32).sub_(means[..., None]).div_(stds[..., None])
        by_step.copy_(patches.view(by_step.shape))
    return out


def cut_frames(frames: torch.Tensor, patch_size: int, temporal_patch_size: int, merge_size: int) -> torch.Tensor:
    """uint8 [F, C, H, W] to [steps * N, C, tp, ps * ps], by one permute on any device.

    It has 8 dims, the most an NPU takes: transformers' own have 9 and 10.
    """
    num_frames, channels, height, width = frames.shape
    steps, rows, columns = num_frames // temporal_patch_size, height // patch_size, width // patch_size
    by_channel = frames.reshape(steps, temporal_patch_size, channels, height, width).transpose(1, 2)
    patches = by_channel.reshape(
        steps,
        channels * temporal_patch_size,
        rows // merge_size,
        merge_size,
        patch_size,
        columns // merge_size,
        merge_size,
        patch_size,
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return patches.reshape(steps * rows * columns, channels, temporal_patch_size, patch_size * patch_size)


def cut_rows(frames: torch.Tensor, patch_size: int, merge_size: int) -> torch.Tensor:
    """uint8 [F, C, H, W] in a CPU's memory, each row of pixels in one piece, to [F, N, C, ps * ps].

    A patch's row of pixels is moved as one item of `ps` bytes, not as so many single bytes.
    """
    num_frames, channels, height, width = frames.shape
    rows, columns = height // patch_size, width // patch_size
    items = frames.numpy().view(f"V{patch_size}").reshape(
        num_frames, channels, rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size
    )  # fmt: skip
    cut = np.ascontiguousarray(items.transpose(0, 2, 5, 3, 6, 1, 4)).view(np.uint8)
    return torch.from_numpy(cut.reshape(num_frames, rows * columns, channels, patch_size * patch_size))


def _fill_from_bytes(by_step: torch.Tensor, cut: torch.Tensor, means: torch.Tensor, stds: torch.Tensor) -> None:
    """`cut` [F, N, C, ps * ps] into `by_step` [steps, N, C, tp, ps * ps], the last frame where frames are missing."""
    per_step, last = by_step.shape[3], len(cut) - 1
    for number, patches in enumerate(cut):
        step, place = divmod(number, per_step)
        places = slice(place, per_step if number == last else place + 1)
        slabs = by_step[step].split(_SLAB_PATCHES), patches.split(_SLAB_PATCHES)
        for into, slab in zip(*slabs, strict=True):
            into[:, :, places] = slab.to(torch.float32).sub_(means).div_(stds)[:, :, None]
