"""Videos and pictures: read as the frames that a model is trained on, and written for people. Needs av and Pillow."""

import io
import math

import torch

VIDEOS, IMAGES = (".mp4", ".mov", ".webm", ".mkv"), (".png", ".jpg", ".jpeg", ".webp")


def read_image(file):
    """Read a picture, upright, in RGB; ValueError if it is none, or has more than 8 bits a channel."""
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(Image.open(file))  # a phone's picture lies on its side
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not an image: {error}") from None
    if image.mode[0] in "IF":
        raise ValueError(f"{file} has 16 or 32 bits a channel (mode {image.mode}): save it with 8")
    return image.convert("RGB")


def read_frames(file, args):
    """Return RGB images of one size from a video, at each 1/24 s the frame shown then, or from an image; 4k + 1, --frames at most.

    Resized and cropped at the centre to --height x --width, or to the size of that area whose shape is nearest.
    ValueError for what can't be read.
    """
    from PIL import Image, ImageOps

    def fit(image):
        size = (args.width, args.height) if args.no_buckets else bucket(*image.size, args.height * args.width)
        return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)

    if file.suffix.lower() in IMAGES:
        return [fit(read_image(file))]
    import av

    frames, shown = [], None
    try:
        with av.open(str(file)) as video:
            stream = video.streams.video[0]
            start, end = None, 0.0
            for frame in video.decode(stream):
                start = frame.time if start is None else start
                while shown and len(frames) / 24 < frame.time - start - 1e-3 and len(frames) < args.frames:
                    frames.append(shown)
                if len(frames) == args.frames:
                    break
                shown = fit(frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True))
                end = frame.time - start + 1 / (stream.average_rate or 24)
            while shown and len(frames) / 24 < end - 1e-3 and len(frames) < args.frames:
                frames.append(shown)
    except (av.error.FFmpegError, IndexError, TypeError, OSError, ValueError) as error:
        raise ValueError(f"it is not a video that can be read ({error})") from None
    if not frames:
        raise ValueError("it has no frames")
    return frames[: (len(frames) - 1) // 4 * 4 + 1]


def bucket(width, height, area):
    """Return the (width, height) in steps of 16, of at most this area, whose shape is nearest to width x height."""

    def distance(size):  # of equal shapes the larger
        return round(abs(math.log(size[0] / size[1] * height / width)), 6), -size[0] * size[1]

    return min([(max(16, area // h // 16 * 16), h) for h in range(16, area // 16 + 1, 16)], key=distance)


# --------------------------------------------------------------------------------------------------------------------
# files that one can watch


def to_bytes(clip):
    """Convert [3, F, H, W] in -1..1 -> [F, H, W, 3] in 0..255, rounded, on the CPU, frame by frame."""
    frames = [(frame / 2 + 0.5).clamp(0, 1).cpu().float().mul(255).round().byte() for frame in clip.unbind(1)]
    return torch.stack(frames).permute(0, 2, 3, 1).contiguous()


def strip(frames, count=6, height=240):
    """Return frames [F, H, W, 3] as the bytes of a .png with some of them side by side, for a look without a player.

    A single frame is the picture itself, at its full size.
    """
    from PIL import Image

    picked = frames[torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()]
    row = Image.fromarray(torch.cat([*picked], 1).numpy())
    data, scale = io.BytesIO(), min(1.0, height / row.height) if len(frames) > 1 else 1.0
    row.resize((round(row.width * scale), round(row.height * scale))).save(data, format="png")
    return data.getvalue()


def check_encoder():
    """Raise ValueError if there is no H.264 encoder."""
    import av

    try:
        av.codec.Codec("libx264", "w")
    except ValueError as error:
        raise ValueError(
            f"PyAV {av.__version__} has no H.264 encoder, libx264, to write an .mp4 with ({error})"
        ) from None


def mp4(frames, rate=24):
    """Return frames [F, H, W, 3] in 0..255 as the bytes of an .mp4: H.264, yuv420p, the model's own 24 frames a second."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options=dict(crf="18"))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        colours = stream.codec_context  # as players expect: limited range, BT.709, and tagged as such
        colours.colorspace = colours.color_primaries = colours.color_trc = colours.color_range = 1
        for frame in frames.numpy():
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return data.getvalue()
