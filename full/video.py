"""Read videos and pictures as the frames that a model is trained on, and write them for people. Needs av and Pillow."""

import contextlib
import io
import math
import shlex

import torch

VIDEOS = tuple(".mp4 .mov .m4v .webm .mkv .avi .wmv .flv .mpg .mpeg .ts .mts .3gp .ogv".split())
IMAGES = tuple(".png .apng .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .avif".split())
UNTAGGED = dict(colorspace=2, color_trc=2, color_range=0)
TO_SDR = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)


def read_image(file):
    """Read a picture, or the first one of an animation: upright, in RGB, white where it is transparent.

    ValueError if the file is not a picture, or has more than 8 bits a channel.
    """
    with one_sentence(f"{file} is not an image"):
        return next(images_of_picture(file))[2]


def read_frames(file, args, notes=None):
    """Return the frames of a video, an animation or a picture as RGB images of one size: one for each 1/24 s, the frame that
    is shown then; 4k + 1 of them, at most --frames.

    They are resized and cropped at the centre to --height x --width, or to the size of that area with the nearest shape.
    notes: a set, to which sentences are added that a person should know. ValueError if the file can't be read.
    """
    from PIL import Image, ImageOps

    notes = set() if notes is None else notes
    picture = file.suffix.lower() in IMAGES
    source = images_of_picture(file) if picture else images_of_video(file, args.frames / 24, notes)
    frames, shown, size, until = [], None, None, 0.0
    with one_sentence(f"it is not {'an image' if picture else 'a video'} that can be read"):
        for start, end, image in source:
            frames += [shown] * (frames_until(start, args.frames) - len(frames))
            if len(frames) == args.frames:
                notes.add(f"longer than the {args.frames / 24:.2f} s that are used")
                break
            if not size:
                nearest = bucket(*image.size, args.height * args.width)
                size = (args.width, args.height) if args.no_buckets else nearest
            if max(size[0] / image.width, size[1] / image.height) > 1.02:
                notes.add("enlarged")
            shown, until = ImageOps.fit(image, size, Image.Resampling.LANCZOS), end
        frames += [shown] * (frames_until(until, args.frames) - len(frames))
    if not frames:
        raise ValueError("it has no frames")
    if len(frames) < min(5, args.frames) and not picture:
        notes.add("of one frame, being shorter than 5")
    return frames[: (len(frames) - 1) // 4 * 4 + 1]


def frames_until(seconds, most):
    """Return how many frames there are in so many seconds, 24 each, and at most `most`."""
    return min(most, math.ceil((seconds - 1e-3) * 24))


class Refused(ValueError):
    """An error with a sentence of our own, which `one_sentence` passes on as it is."""


@contextlib.contextmanager
def one_sentence(what):
    """Turn anything that a library raises (SyntaxError, EOFError, struct.error, its own kinds) into a ValueError of one
    sentence."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from None


def images_of_picture(file):
    """Yield (start, end, RGB image) for a picture, or for each picture of an animation, in seconds."""
    from PIL import Image, ImageOps

    with Image.open(file) as picture:
        if picture.mode[0] in "IF":
            raise Refused(f"{file} has 16 or 32 bits a channel (mode {picture.mode}): save it with 8")
        moves = picture.format in ("GIF", "PNG", "WEBP", "AVIF")  # others have pages, or a preview
        count, end = picture.n_frames if moves else 1, 0.0
        for n in range(1 if getattr(picture, "default_image", False) and count > 1 else 0, count):
            picture.seek(n)
            image = on_white(ImageOps.exif_transpose(picture))  # a phone's picture lies on its side
            lasts = picture.info.get("duration", 0) / 1000 if count > 1 else 1 / 24
            start, end = end, end + (lasts if lasts > 0.01 else 0.1)  # as browsers do
            yield start, end, image


def on_white(image):
    """Return an RGB image with white where the image is transparent, whatever colour is hidden there."""
    from PIL import Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def images_of_video(file, seconds, notes):
    """Yield (start, end, RGB image) of each frame of a video, in seconds from the first one.

    Rates within 1 % of 24 a second are taken as 24. ValueError if the file ends earlier than its header says, within the
    `seconds` that are used, and for HDR (PQ) that was not converted for other screens.
    """
    import av
    from av.stream import Disposition

    with av.open(str(file)) as video:
        streams = [stream for stream in video.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams or video.format.name == "tty":  # tty draws the letters of a text file
            raise Refused("it has no video")
        if video.metadata.get("major_brand") in ("heic", "heix", "mif1", "msf1"):
            raise Refused("it is a HEIC picture, of which one tile would be read: save it as .jpg")
        best = video.streams.best("video")
        stream = best if best in streams else streams[0]
        rate, pixel = float(stream.average_rate or stream.guessed_rate or 24), float(stream.sample_aspect_ratio or 1)
        duration = (video.duration or 0) / av.time_base
        if stream.duration:
            duration = float(stream.duration * stream.time_base)
        if video.format.name == "avi":  # its duration is a guess if its index is cut off
            duration = stream.frames / rate
        head = {tag: getattr(stream.codec_context, tag) for tag in UNTAGGED}
        first, count, reached = None, 0, 0.0
        for packet in video.demux():
            if packet.pts is not None and (packet.stream is stream or not stream.duration):
                end = packet.pts + (packet.duration or 0)
                reached = max(reached, float(end * packet.time_base))
            for frame in packet.decode() if packet.stream is stream else ():
                time = count / rate if frame.time is None else frame.time
                first, count = time if first is None else first, count + 1
                times = time - first, time - first + 1 / rate
                if abs(rate / 24 - 1) <= 0.01:
                    times = (round(time * rate) / 24 for time in times)
                for tag in (tag for tag, unset in UNTAGGED.items() if getattr(frame, tag) == unset):
                    setattr(frame, tag, head[tag])
                if frame.color_trc == 16:
                    cure = f"ffmpeg -i {shlex.quote(str(file))} -vf {TO_SDR} SDR.mp4"
                    raise Refused(f"it is HDR (PQ), which would be too dark. A copy to use in its place: {cure}")
                notes |= {"HLG, read as SDR screens show it"} if frame.color_trc == 18 else set()
                notes |= {"interlaced"} if frame.interlaced_frame else set()
                yield *times, image_of(frame, pixel)
        expected = duration - max(0.1, 2 / rate)
        needed = (first or 0) + seconds - 0.5 / rate
        if reached < min(expected, needed):
            raise Refused(f"it is cut off: {reached:.2f} s of {duration:.2f} s are there")


def image_of(frame, pixel):
    """Return a frame as an upright RGB image. pixel: width / height of its pixels, which become square.

    Colours without a tag are taken for BT.709 from 720 lines on, and for BT.601 below, as players do.
    """
    from PIL import Image

    untagged = frame.colorspace in (2, 3)
    colours = dict(src_colorspace="ITU709" if frame.height >= 720 else "ITU601") if untagged else {}
    alpha = any(part.is_alpha for part in frame.format.components)
    image = on_white(Image.fromarray(frame.to_ndarray(format="rgba" if alpha else "rgb24", **colours)))
    if pixel != 1:
        size = round(frame.width * pixel), frame.height
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image.rotate(frame.rotation, expand=True)


def bucket(width, height, area):
    """Return the (width, height) in steps of 16, of at most this area, whose shape is nearest to width x height."""

    def distance(size):  # of equal shapes the larger
        w, h = size
        return round(abs(math.log(w / h * height / width)), 6), -w * h

    heights = range(16, area // 16 + 1, 16)
    sizes = [(max(16, area // h // 16 * 16), h) for h in heights]
    return min(sizes, key=distance)


# --------------------------------------------------------------------------------------------------------------------
# files for people to watch


def to_bytes(clip):
    """Convert [3, F, H, W] in -1..1 -> [F, H, W, 3] in 0..255, rounded, on the CPU, frame by frame."""
    frames = [(frame / 2 + 0.5).clamp(0, 1).cpu() for frame in clip.unbind(1)]
    frames = [frame.float().mul(255).round().byte() for frame in frames]
    return torch.stack(frames).permute(0, 2, 3, 1).contiguous()


def strip(frames, count=6, height=240):
    """Return the bytes of a .png with some of the frames [F, H, W, 3] side by side, for a look without a player.

    A single frame is the picture itself, at its full size.
    """
    from PIL import Image

    numbers = torch.linspace(0, len(frames) - 1, min(count, len(frames)))
    picked = frames[numbers.round().long()]
    row = Image.fromarray(torch.cat([*picked], 1).numpy())
    scale = min(1.0, height / row.height) if len(frames) > 1 else 1.0
    size = round(row.width * scale), round(row.height * scale)
    data = io.BytesIO()
    row.resize(size).save(data, format="png")
    return data.getvalue()


def check_encoder():
    """Raise ValueError if PyAV reads colours wrongly, or has no H.264 encoder."""
    import av

    if int(av.__version__.split(".")[0]) < 17:
        raise ValueError(f"PyAV {av.__version__} reads the colours of tagged videos wrongly: pip install 'av>=17'")
    try:
        av.codec.Codec("libx264", "w")
    except ValueError as error:
        raise ValueError(
            f"PyAV {av.__version__} has no H.264 encoder, libx264, to write an .mp4 with ({error})"
        ) from None


def mp4(frames, rate=24):
    """Return the bytes of an .mp4 of frames [F, H, W, 3] in 0..255: H.264, yuv420p, the model's own 24 frames a second."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options=dict(crf="18"))
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "yuv420p"
        colours = stream.codec_context  # as players expect: limited range, BT.709, and tagged as such
        colours.colorspace = colours.color_primaries = colours.color_trc = colours.color_range = 1
        for frame in frames.numpy():
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return data.getvalue()
