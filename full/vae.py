"""Decode the VAE's tiles on the ranks of a group, one rank a tile, so that any number of ranks gives the same frames."""

import math

import torch

from comm import all_to_all, group_rank, group_size


@torch.no_grad()
def encode_frames(vae, frames):
    """Encode RGB images of one size -> latents [1, 16, T, h, w] in float32: the posterior's mean × the scaling factor."""
    width, height = frames[0].size
    data = b"".join(frame.tobytes() for frame in frames)
    pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(len(frames), height, width, 3)
    video = pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    video = video.to(vae.device, vae.dtype)
    return vae.encode(video).latent_dist.mode().float() * vae.config.scaling_factor


@torch.no_grad()
def decode(vae, latents, group=None):
    """Decode latents [16, T, h, w], equal on all ranks -> pixels [3, F, H, W] on the group's first rank, None on the others.

    Tiles, blending and result are those of diffusers' AutoencoderKLHunyuanVideo after enable_tiling(). Each tile is decoded
    by one rank, by itself, so the frames do not depend on the number of ranks.
    """
    rank = group_rank(group)
    z = (latents.to(vae.dtype) / vae.config.scaling_factor)[None]
    times, rows, columns = plan = decode_plan(vae, latents.shape[1:])
    tiles = [(t, y, x) for t in times for y in rows for x in columns]
    shapes = [pixel_shape(tile) for tile in tiles]
    sizes = [math.prod(shape) for shape in shapes]
    owners, counts = share_out(sizes, group_size(group))
    mine = z.new_empty(1, counts[rank])
    place = 0
    for tile, size, owner in zip(tiles, sizes, owners):
        if owner == rank:
            (t0, t1), (y0, y1), (x0, x1) = tile
            part = vae.post_quant_conv(z[:, :, t0:t1, y0:y1, x0:x1])
            mine[0, place : place + size] = vae.decoder(part).flatten()
            place += size
    to_first = [1] + [0] * (len(counts) - 1)
    everything = all_to_all(mine, group, 0, 1, to_first, counts)
    if rank > 0:
        return None
    order = sorted(range(len(tiles)), key=lambda n: owners[n])  # tiles arrive rank by rank
    parts = everything[0].split([sizes[n] for n in order])
    decoded = {tiles[n]: part.view(shapes[n]) for n, part in zip(order, parts)}
    _, frames, height, width = pixel_shape([(0, length) for length in latents.shape[1:]])
    return blend_tiles(vae, plan, decoded)[:, :frames, :height, :width]


def pixel_shape(tile):
    """Return [3, F, H, W] of the pixels that a tile of latents decodes to. tile: three spans (start, stop)."""
    time, height, width = (stop - start for start, stop in tile)
    return 3, 4 * time - 3, 8 * height, 8 * width


def decode_plan(vae, shape):
    """Return three lists of spans (start, stop) that cut latents (T, h, w) into tiles: in time, in height, in width."""

    def spans(length, tile, stride, several):
        starts = range(0, length, stride) if several else [0]
        return [(a, min(a + tile, length) if several else length) for a in starts]

    T, h, w = shape
    frames = vae.tile_sample_min_num_frames // 4
    every = vae.tile_sample_stride_num_frames // 4
    tiles = vae.tile_sample_min_height // 8, vae.tile_sample_min_width // 8
    strides = vae.tile_sample_stride_height // 8, vae.tile_sample_stride_width // 8
    several = h > tiles[0] or w > tiles[1]
    times = spans(T, frames + 1, every, T > frames)
    # all but the first time span drop their first pixel frame: a span of one latent frame would leave nothing
    times = [(a, b) for a, b in times if a == 0 or b - a > 1]
    rows = spans(h, tiles[0], strides[0], several)
    columns = spans(w, tiles[1], strides[1], several)
    return times, rows, columns


def share_out(sizes, ranks):
    """Assign each size, the largest first, to the rank with the least so far. Return (owner of each, total of each rank)."""
    owners, counts = [0] * len(sizes), [0] * ranks
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        owners[n] = counts.index(min(counts))
        counts[owners[n]] += sizes[n]
    return owners, counts


def blend_tiles(vae, plan, decoded):
    """Join {(time, row, column): pixels [3, f, y, x]} -> [3, F, H, W]. Each tile is blended with its neighbours, which are
    blended already: first the one above, then the left one; time comes after space."""
    times, rows, columns = plan
    axes = ("num_frames", "height", "width")
    stride_t, stride_h, stride_w = strides = [getattr(vae, f"tile_sample_stride_{axis}") for axis in axes]
    sizes = [getattr(vae, f"tile_sample_min_{axis}") for axis in axes]
    overlap_t, overlap_h, overlap_w = (size - stride for size, stride in zip(sizes, strides))
    clips = []
    for time_span in times:
        grid = [[decoded[time_span, row, column] for column in columns] for row in rows]
        for i, line in enumerate(grid):
            for j, tile in enumerate(line):
                if i > 0:
                    blend(grid[i - 1][j], tile, 2, overlap_h)
                if j > 0:
                    blend(line[j - 1], tile, 3, overlap_w)
        if len(rows) * len(columns) > 1:
            for line in grid:
                line[:] = [tile[:, :, :stride_h, :stride_w] for tile in line]
        clip = torch.cat([torch.cat(line, 3) for line in grid], 2)
        if clips:
            clip = clip[:, 1:]
            blend(clips[-1], clip, 1, overlap_t)
        clips.append(clip)
    lengths = [stride_t + 1, *[stride_t] * (len(clips) - 1)]
    return torch.cat([clip[:, :length] for clip, length in zip(clips, lengths)], 1)


def blend(before, tile, dim, length):
    """Fade from the end of `before` into the start of `tile`, in place."""
    length = min(length, before.shape[dim], tile.shape[dim])
    weight = torch.arange(length, dtype=torch.float64) / length
    weight = weight.view(-1, *[1] * (tile.dim() - 1 - dim)).to(tile.device)
    end = before.narrow(dim, before.shape[dim] - length, length)
    start = tile.narrow(dim, 0, length)
    faded = end * (1 - weight).to(tile.dtype)
    start.copy_(faded + start * weight.to(tile.dtype))
