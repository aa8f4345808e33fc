"""Videos, pictures and captions as people have them, made by FFmpeg's own encoders: pixels and times count."""

import contextlib
import json
import math
import os
import re
import signal
import struct
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image
from safetensors.torch import load_file

import full.encode
from full.captions import Entry, sample_name, videos_and_captions
from full.encode import encode_one
from full.folder import Folder
from full.snapshot import Snapshot
from full.video import check_encoder, read_frames, read_image
from test_sp import fork

av.logging.set_level(None)


def size(height=16, width=16, frames=129, no_buckets=False):
    return SimpleNamespace(height=height, width=width, frames=frames, no_buckets=no_buckets)


def flat(level, height=16, width=16):
    """A frame of one colour: its number, or (r, g, b)."""
    return np.full((height, width, 3), level, np.uint8)


def numbered(count):
    return [flat(2 * n) for n in range(count)]


def video(file, frames, rate=24, codec="libx264rgb", pix="rgb24", setup=None, sound=0.0, times=None, **container):
    """Write frames, arrays or av's own; lossless by default. sound: seconds. times: in ms, in place of the rate."""
    options = dict(crf="0") if codec == "libx264rgb" else {}
    with av.open(str(file), "w", **container) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = (
            (frames[0].height, frames[0].width) if hasattr(frames[0], "planes") else frames[0].shape[:2]
        )
        stream.pix_fmt = pix
        voice = out.add_stream("mp2" if str(file).endswith("mpg") else "aac", rate=48000) if sound else None
        if setup:
            setup(stream)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for n, frame in enumerate(frames):
            frame = frame if hasattr(frame, "planes") else av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[n], Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        for n in range(int(sound * 48000) // 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.int16), format="s16", layout="stereo")
            silence.sample_rate, silence.pts, silence.time_base = 48000, n * 1024, Fraction(1, 48000)
            packets += voice.encode(silence)
        packets += voice.encode() if voice else []
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    return file


def levels(file, args=None, notes=None):
    """Return the numbers of the flat frames that read_frames gives."""
    return [round(np.asarray(frame)[8, 8].mean() / 2) for frame in read_frames(file, args or size(), notes)]


# --------------------------------------------------------------------------------------------------------------------
# times


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "mov"])
@pytest.mark.parametrize("rate", ["24", "24000/1001", "2398/100", "25", "30000/1001", "30", "60", "12"])
def test_frames_at_a_rate(rate, ending, tmp_path):
    """About 24 a second frame by frame, whatever a file rounds its times to; of another rate the frame shown each 1/24 s."""
    rate, count = Fraction(rate), 70
    found = levels(video(tmp_path / f"a.{ending}", numbered(count), rate))
    if abs(rate - 24) < 0.1:
        assert found == [*range(69)]
        return
    for n, shown in enumerate(found):  # to 1 ms and what a file rounds its times to
        assert math.floor((n / 24 + 0.0003) * rate) <= shown <= math.floor((n / 24 + 0.0017) * rate), (n, shown)
    frames = min(129, math.ceil(count * 24 / rate))
    assert len(found) == (frames - 1) // 4 * 4 + 1


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_frames_of_a_varying_rate(ending, tmp_path):
    times = [0, 50, 90, 400, 410, 420, 800, 1000]
    found = levels(video(tmp_path / f"a.{ending}", numbered(8), 1000, times=times, pix="rgb24"))
    shown = [max(i for i, time in enumerate(times) if time <= n * 1000 / 24 + 1) for n in range(24)]
    assert found[:21] == shown[:21]


def test_frames_without_times(tmp_path):
    """A raw stream has none: they are counted."""
    assert levels(video(tmp_path / "a.h264", numbered(9), 25)) == [*range(9)]


@pytest.mark.parametrize("name, more", [
    ("a.gif", {}), ("a.webp", dict(lossless=True)), ("a.png", {}), ("a.apng", dict(format="PNG")),
    ("a.avif", dict(quality=100)), ("hidden.png", dict(default_image=True)),
])  # fmt: skip
def test_an_animation(name, more, tmp_path):
    """All its frames, at their own times; one without a time is shown for 0.1 s, as browsers do."""
    first, *rest = (Image.fromarray(flat(40 * n)) for n in range(5))
    times = [100, 250, 40, 10 if "avif" in name else 0, 300]
    if name == "hidden.png":  # its first picture is for programs that see no animations
        times = times[1:]
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=times, **more)
    found = [round(level / 20) for level in levels(tmp_path / name)]
    wanted = [1] * 6 + [2] + [3] * 3 + [4] * 7 if name == "hidden.png" else [0] * 3 + [1] * 6 + [2] + [3] * 2 + [4] * 5
    assert found == wanted


def test_a_picture_of_several_pages_is_one_picture(tmp_path):
    first, *rest = (Image.fromarray(flat(40 * n)) for n in range(5))
    first.save(tmp_path / "a.tif", save_all=True, append_images=rest)
    first.save(tmp_path / "b.gif")
    assert [levels(tmp_path / name) for name in ("a.tif", "b.gif")] == [[0], [0]]


# --------------------------------------------------------------------------------------------------------------------
# whole or cut off

WHOLE = {
    "a.mp4": {},
    "a.mov": dict(sound=1.0),
    "long.mp4": dict(sound=4.0),
    "long.mkv": dict(sound=4.0),
    "short.mkv": dict(sound=0.5),
    "a.webm": dict(codec="libvpx-vp9", pix="yuv420p"),
    "a.avi": dict(codec="mpeg4", pix="yuv420p"),
    "b.avi": {},
    "a.mpg": dict(codec="mpeg2video", pix="yuv420p", sound=2.0),
    "a.ts": dict(codec="mpeg2video", pix="yuv420p"),
    "a.flv": dict(codec="flv", pix="yuv420p"),
    "a.wmv": dict(codec="wmv2", pix="yuv420p"),
    "a.ogv": dict(codec="libvpx", pix="yuv420p"),
    "a.m4v": dict(format="mp4"),
    "a.3gp": dict(codec="mpeg4", pix="yuv420p"),
    "first.mp4": dict(options=dict(movflags="faststart"), sound=2.0),
    "parts.mp4": dict(options=dict(movflags="frag_keyframe+empty_moov")),
    "late.mkv": dict(times=[5000 + 40 * n for n in range(49)]),
    "late.mp4": dict(times=[5000 + 40 * n for n in range(49)]),
    "slow.mkv": dict(rate=2),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_read(name, tmp_path):
    """Files of every muxer, with longer or shorter sound, or starting late: none is taken for one that is cut off."""
    moving = [flat(30, 64, 64) for _ in range(49)]
    for n, frame in enumerate(moving):
        frame[n : n + 12, n : n + 12] = 200
    more = dict(rate=24) | WHOLE[name]
    file = video(tmp_path / name, moving, **more)
    count = 129 if name == "slow.mkv" else 45 if name.startswith("late") else 49
    assert len(read_frames(file, size(64, 64))) == count


@pytest.mark.parametrize("name, part", [
    ("a.webm", 0.5), ("a.webm", 0.9), ("b.mkv", 0.5), ("b.mkv", 0.9), ("sound.mkv", 0.6), ("a.flv", 0.6), ("first.mp4", 0.6),
    ("a.avi", 0.6), ("a.mp4", 0.9), ("parts.mp4", 0.6),
])  # fmt: skip
def test_a_file_that_is_cut_off(name, part, tmp_path):
    """Is named, with how much is there; but the part that is used may be whole."""
    moving = [np.random.RandomState(n).randint(0, 255, (64, 64, 3), dtype=np.uint8) for n in range(48)]
    more = WHOLE.get(name) or (dict(sound=2.0) if name == "sound.mkv" else {})
    file = video(tmp_path / name, moving, **dict(rate=24) | more)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    # where FFmpeg itself stumbles over the last frame, or finds no head, the sentence is its own
    said = r"it is cut off: [01]\.\d\d s of (2\.0|1\.9)"
    with pytest.raises(
        ValueError, match=said if "mp4" not in name else "it is not a video that can be read|it is cut off"
    ):
        read_frames(file, size(64, 64))
    if name in ("a.webm", "b.mkv", "a.flv", "a.avi", "first.mp4"):
        assert len(read_frames(file, size(64, 64, frames=5))) == 5


def test_the_part_that_is_used_may_be_all_that_is_there(tmp_path):
    moving = [np.random.RandomState(n).randint(0, 255, (64, 64, 3), dtype=np.uint8) for n in range(48)]
    data = video(
        tmp_path / "a.mkv", moving, setup=lambda stream: setattr(stream.codec_context, "max_b_frames", 0)
    ).read_bytes()
    counts = set()
    for part in range(30, 50):
        (tmp_path / "a.mkv").write_bytes(data[: len(data) * part // 100])
        with av.open(str(tmp_path / "a.mkv")) as there:
            count = len([*there.decode(video=0)])
        if count not in counts:
            counts.add(count)
            assert len(read_frames(tmp_path / "a.mkv", size(64, 64, frames=count))) == (count - 1) // 4 * 4 + 1
            with pytest.raises(ValueError, match="cut off"):
                read_frames(tmp_path / "a.mkv", size(64, 64, frames=count + 1))
    assert len(counts) > 3


def test_words_under_a_video_do_not_make_it_whole(tmp_path):
    """A subtitle that lasts until the end is stored where it begins."""
    moving = [np.random.RandomState(n).randint(0, 255, (64, 64, 3), dtype=np.uint8) for n in range(48)]
    with av.open(str(tmp_path / "a.mp4"), "w", options=dict(movflags="faststart")) as out:
        stream = out.add_stream("mpeg4", rate=24)  # whose decoder takes half a frame
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        words = out.add_mux_stream("mov_text")
        packet = av.Packet(b"\x00\x05hello")
        packet.stream, packet.time_base, packet.pts, packet.dts, packet.duration = words, Fraction(1, 1000), 0, 0, 2000
        out.mux(packet)
        for frame in [av.VideoFrame.from_ndarray(x, format="rgb24") for x in moving] + [None]:
            out.mux(stream.encode(frame))
    assert len(read_frames(tmp_path / "a.mp4", size(64, 64))) == 45
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ValueError, match=r"it is cut off: 1\.\d\d s of 2\.00 s are there"):
        read_frames(tmp_path / "a.mp4", size(64, 64))


# --------------------------------------------------------------------------------------------------------------------
# shapes


def disc(pixel, height=288, width=288):
    """A disc that is round where a pixel is `pixel` times as wide as high."""
    y, x = np.mgrid[:height, :width]
    inside = (y - height / 2) ** 2 + ((x - width / 2) * pixel) ** 2 < 60**2
    return np.where(inside[..., None], 230, 20).astype(np.uint8).repeat(3, 2)


@pytest.mark.parametrize("pixel, turn", [("16/9", 0), ("16/9", 90), ("8/9", 0), ("8/9", 180), ("1", 270)])
@pytest.mark.parametrize("no_buckets", [False, True])
def test_pixels_that_are_not_square(pixel, turn, no_buckets, tmp_path):
    """A disc that is round on the screen is round in the frames; the picture's shape is the screen's."""

    def setup(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(pixel)
        stream.set_display_rotation(turn)

    video(tmp_path / "a.mp4", [disc(float(Fraction(pixel)))] * 5, setup=setup)
    frame = read_frames(tmp_path / "a.mp4", size(360, 640, no_buckets=no_buckets))[1]
    y, x = np.where(np.asarray(frame)[..., 0] > 120)
    assert abs(y.std() / x.std() - 1) < 0.03
    shape = float(Fraction(pixel)) ** (-1 if turn in (90, 270) else 1)
    if not no_buckets:
        assert abs(frame.width / frame.height / shape - 1) < 0.08, frame.size


def test_frames_of_one_size(tmp_path):
    """A stream whose shape changes gives samples of one shape all the same: that of its first frame."""
    parts = [video(tmp_path / f"{n}.ts", [flat(90, *shape)] * 6, codec="mpeg2video", pix="yuv420p").read_bytes()
             for n, shape in enumerate([(64, 96), (96, 64)])]  # fmt: skip
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    frames = read_frames(tmp_path / "a.ts", size(64, 96))
    assert {frame.size for frame in frames} == {(96, 64)}


def with_cover(file, cover_first=True, real=True):
    """A video with a picture of its own as another stream, as shops and phones write it."""
    with av.open(str(file), "w") as out:
        streams = [
            out.add_stream("mjpeg", rate=1),
            *([out.add_stream("libx264rgb", rate=24, options=dict(crf="0"))] if real else []),
        ]
        for stream, side, pix in zip(streams, (600, 16), ("yuvj420p", "rgb24")):
            stream.height, stream.width, stream.pix_fmt = side, side, pix
        streams[0].disposition = Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(flat(250, 600, 600), format="rgb24")
        for packet in streams[0].encode(picture) + streams[0].encode():
            out.mux(packet)
        for frame in [av.VideoFrame.from_ndarray(x, format="rgb24") for x in numbered(9)] + [None] if real else []:
            out.mux(streams[1].encode(frame))
    return file


def test_a_cover_is_not_the_video(tmp_path):
    assert levels(with_cover(tmp_path / "a.mp4")) == [*range(9)]
    assert levels(with_cover(tmp_path / "a.mkv")) == [*range(9)]
    with av.open(str(tmp_path / "b.mkv"), "w") as out:
        Image.fromarray(flat(250, 600, 600)).save(tmp_path / "cover.jpg")
        out.add_attachment("cover.jpg", "image/jpeg", (tmp_path / "cover.jpg").read_bytes())
        stream = out.add_stream("libx264rgb", rate=24, options=dict(crf="0"))
        stream.height, stream.width, stream.pix_fmt = 16, 16, "rgb24"
        for frame in [av.VideoFrame.from_ndarray(x, format="rgb24") for x in numbered(9)] + [None]:
            out.mux(stream.encode(frame))
    assert levels(tmp_path / "b.mkv") == [*range(9)]
    with pytest.raises(ValueError, match="it has no video"):
        read_frames(with_cover(tmp_path / "music.mp4", real=False), size())


# --------------------------------------------------------------------------------------------------------------------
# colours

BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)  # of red and of blue in luma


def plane_values(colour, weights, full=False):
    """(Y, U, V) in 8 bits of a colour, by the standard's formula."""
    (r, g, b), (red, blue) = (x / 255 for x in colour), weights
    luma = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    return (255 * luma, 128 + 255 * u, 128 + 255 * v) if full else (16 + 219 * luma, 128 + 224 * u, 128 + 224 * v)


def yuv_video(file, values, height=64, codec="libx264", pix="yuv420p", tag=None, full=False, curve=None, setup=None):
    def tagged(stream):
        context = stream.codec_context
        context.options = dict(crf="1", qp="1") | ({"x265-params": "log-level=none"} if codec == "libx265" else {})
        if tag:
            context.colorspace = tag
        if full:
            context.color_range = 2
        if curve:
            context.color_trc = curve
        if setup:
            setup(stream)

    deep = pix.endswith("10le")
    frame = av.VideoFrame(96, height, pix)
    for plane, value in zip(frame.planes, values):
        row = np.full(
            plane.line_size * plane.height // (2 if deep else 1),
            round(value * (4 if deep else 1)),
            "<u2" if deep else "u1",
        )
        plane.update(row.tobytes())
    frames = []
    for _ in range(3):
        copy = av.VideoFrame(96, height, pix)
        for to, of in zip(copy.planes, frame.planes):
            to.update(bytes(of))
        copy.colorspace, copy.color_range = tag or 2, 2 if full else 0
        if curve:
            copy.color_trc = curve
        frames.append(copy)
    return video(file, frames, codec=codec, pix=pix, setup=tagged)


COLOUR = (200, 60, 30)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("weights, more", [
    (BT601, {}), (BT601, dict(height=718)), (BT709, dict(height=720)), (BT709, dict(height=1080)),
    (BT709, dict(tag=1)), (BT601, dict(tag=6)), (BT601, dict(tag=5)),
    (BT601, dict(tag=6, height=720)), (BT709, dict(tag=1, height=720)),
    (BT601, dict(full=True, tag=6)), (BT709, dict(full=True, tag=1)), (BT601, dict(full=True, pix="yuvj420p")),
    (BT709, dict(full=True, height=720)), (BT709, dict(pix="yuv444p", height=720)),
    (BT709, dict(tag=1, pix="yuv420p10le", codec="libx265")), (BT2020, dict(tag=9, pix="yuv420p10le", codec="libx265")),
    (BT709, dict(height=720, pix="yuv420p10le", codec="libx265")),
], ids=str)  # fmt: skip
def test_colours(weights, more, ending, tmp_path):
    """As they are tagged; without a tag as players show them: BT.709 from 720 lines on."""
    values = plane_values(COLOUR, weights, more.get("full", False))
    file = yuv_video(tmp_path / f"a.{ending}", values, **more)
    seen = np.asarray(read_frames(file, size())[0])[8, 8]
    assert np.abs(seen.astype(int) - COLOUR).max() <= 5, seen


def test_colours_that_are_rgb_have_no_matrix(tmp_path):
    assert levels(video(tmp_path / "a.mp4", [flat(80, 720, 16)] * 5)) == [40] * 5
    for codec, pix in (("png", "rgb24"), ("png", "rgba"), ("qtrle", "argb")):
        frame = av.VideoFrame.from_ndarray(flat((200, 60, 30), 720, 16), format="rgb24").reformat(format=pix)
        file = video(tmp_path / f"{codec}-{pix}.mov", [frame], codec=codec, pix=pix)
        assert tuple(np.asarray(read_frames(file, size())[0])[8, 8]) == (200, 60, 30), codec


@pytest.mark.parametrize("ending, codec", [("mp4", "libx265"), ("mkv", "libx265")])
def test_hdr(ending, codec, tmp_path):
    """PQ would come out too dark: it is refused with the cure. HLG was made to look right: it is read, and said."""
    notes, values = set(), plane_values(COLOUR, BT2020)
    more = dict(pix="yuv420p10le", codec=codec, tag=9)
    file = yuv_video(tmp_path / f"hlg.{ending}", values, curve=18, **more)
    seen = np.asarray(read_frames(file, size(64, 96), notes)[0])[30, 40]
    assert np.abs(seen.astype(int) - COLOUR).max() <= 5 and "HLG, read as SDR screens show it" in notes
    file = yuv_video(tmp_path / f"it's p.{ending}", values, curve=16, **more)
    with pytest.raises(ValueError, match=r"it is HDR \(PQ\).*ffmpeg -i '.*it'\"'\"'s p.*zscale=.*tonemap=.* SDR.mp4"):
        read_frames(file, size(64, 96))


def test_colours_that_the_head_of_the_file_alone_says(tmp_path):
    """And not the stream: they count as well."""

    def tag_late(stream, space, curve):
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = 96, 64, "yuv420p10le"
        context.options = {"x265-params": "log-level=none"}
        context.open()
        context.colorspace, context.color_trc, context.color_primaries = space, curve, space

    values, more = plane_values(COLOUR, BT709), dict(pix="yuv420p10le", codec="libx265")
    for ending in ("mkv", "mp4"):
        file = yuv_video(tmp_path / f"a.{ending}", values, setup=lambda stream: tag_late(stream, 1, 1), **more)
        seen = np.asarray(read_frames(file, size())[0])[8, 8]
        assert np.abs(seen.astype(int) - COLOUR).max() <= 5, seen
        file = yuv_video(tmp_path / f"b.{ending}", values, setup=lambda stream: tag_late(stream, 9, 16), **more)
        with pytest.raises(ValueError, match="it is HDR"):
            read_frames(file, size())


def test_a_pyav_that_reads_colours_wrongly_is_refused(snapshot):
    with mock.patch.object(av, "__version__", "16.1.0"):
        for check in (check_encoder, lambda: Snapshot(snapshot)):
            with pytest.raises(
                ValueError, match=r"PyAV 16.1.0 reads the colours of tagged videos wrongly: pip install 'av>=17'"
            ):
                check()


HIDDEN = (255, 0, 255)


def transparent(mode):
    """A picture 96 x 64 whose middle is green, and around it transparent, with a colour that lies hidden."""
    image = Image.new("RGBA", (96, 64), (*HIDDEN, 0))
    image.paste((10, 200, 10, 255), (30, 20, 60, 40))
    if mode == "LA":
        return image.convert("LA")
    if mode == "P":
        return image.convert("RGB").quantize(4)
    return image.convert("RGB") if mode == "RGB" else image


@pytest.mark.parametrize("name, mode", [
    ("a.png", "RGBA"), ("la.png", "LA"), ("p.png", "P"), ("rgb.png", "RGB"), ("a.webp", "RGBA"), ("a.gif", "RGBA"),
    ("moves.gif", "RGBA"), ("moves.webp", "RGBA"), ("moves.png", "RGBA"),
])  # fmt: skip
def test_white_lies_under_what_is_transparent(name, mode, tmp_path):
    image, more = transparent(mode), {}
    if mode in "PRGB" and mode != "RGBA":
        more = dict(transparency=image.getpixel((0, 0)))
    if name.startswith("moves"):
        more = dict(
            save_all=True,
            append_images=[transparent("RGBA").transpose(Image.Transpose.ROTATE_180), image],
            duration=100,
        )
    image.save(tmp_path / name, **more, **(dict(lossless=True, exact=True) if "webp" in name else {}))
    frames = [read_image(tmp_path / name), *read_frames(tmp_path / name, size(64, 96))]
    assert len(frames) == (6 if name.startswith("moves") else 2)
    for frame in frames:
        assert frame.mode == "RGB" and frame.getpixel((2, 2)) == (255, 255, 255)
        green = frame.getpixel((45, 30))
        assert green[1] > green[0] + 100 or (mode == "LA" and green[0] < 200), green


@pytest.mark.parametrize("codec, pix, name", [("qtrle", "argb", "a.mov"), ("ffv1", "yuva420p", "a.mkv")])
def test_white_lies_under_a_transparent_video(codec, pix, name, tmp_path):
    picture = av.VideoFrame.from_ndarray(np.asarray(transparent("RGBA")), format="rgba")
    frames = [picture.reformat(format=pix) for _ in range(5)]
    for n, frame in enumerate(frames):
        frame.pts = n
    frame = read_frames(video(tmp_path / name, frames, codec=codec, pix=pix), size(64, 96))[0]
    assert min(frame.getpixel((2, 2))) >= 254 and frame.getpixel((45, 30))[0] < 20


# --------------------------------------------------------------------------------------------------------------------
# what is said


def test_what_a_person_should_know(tmp_path):
    def comb(stream):
        stream.codec_context.options = {"flags": "+ildct+ilme", "x264-params": "interlaced=1"}

    def notes_of(file, args):
        notes = set()
        read_frames(file, args, notes)
        return notes

    moving = [flat(n, 64, 96) for n in range(12)]
    assert notes_of(video(tmp_path / "a.mp4", moving), size(64, 96)) == set()
    assert notes_of(video(tmp_path / "c.mp4", moving, codec="libx264", pix="yuv420p", setup=comb), size(64, 96)) == {
        "interlaced"
    }
    assert notes_of(tmp_path / "a.mp4", size(128, 192)) == {"enlarged"}
    assert notes_of(tmp_path / "a.mp4", size(64, 96, frames=9)) == {"longer than the 0.38 s that are used"}
    assert notes_of(video(tmp_path / "b.mp4", moving[:4]), size(64, 96)) == {"of one frame, being shorter than 5"}
    assert notes_of(tmp_path / "b.mp4", size(64, 96, frames=1)) == {"longer than the 0.04 s that are used"}
    Image.fromarray(moving[0]).save(tmp_path / "a.png")
    assert notes_of(tmp_path / "a.png", size(64, 96)) == set()


def test_what_is_said_of_many_files(tmp_path, capsys):
    """Their number, and the first 20."""
    entries = [Entry(Path(f"v/{n}.mp4"), f"{n}.mp4", "x") for n in range(30)]
    results = [("made", ["interlaced"] if n % 2 else ["enlarged", "interlaced"]) for n in range(30)]
    for name in ("0.mp4", "7.mp4", "older", Folder.EMPTY.removesuffix(".safetensors")):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    full.encode.report(entries, [Path("v/a.pdf")], results, SimpleNamespace(output=tmp_path, videos="v"))
    assert capsys.readouterr().out.splitlines() == [
        f"wrote 30 samples to {tmp_path}, 0 existed already, 0 skipped",
        f"not in v any more, but training uses them until you delete them (1): {tmp_path}/older.safetensors",
        "not used (1): v/a.pdf",
        "enlarged (15): " + ", ".join(f"v/{n}.mp4" for n in range(0, 30, 2)),
        "interlaced (30): " + ", ".join(f"v/{n}.mp4" for n in range(20)) + " and 10 more",
    ]


def test_one_frame_is_nothing_for_token_replace(tmp_path):
    """It is given the first frame, and learns those after it: training refuses such a sample."""
    video(tmp_path / "short.mp4", numbered(4))
    Image.fromarray(flat(3)).save(tmp_path / "a.png")
    for file in (tmp_path / "short.mp4", tmp_path / "a.png"):
        entry, args = Entry(file, file.name, "a box"), SimpleNamespace(output=tmp_path, **vars(size()))
        outcome, _ = encode_one(entry, full.encode.size_of(file), None, None, dict(kind="token_replace"), args)
        assert re.search("skipping .*: it is one frame, which a token_replace model is given", outcome)
    assert not [*tmp_path.glob("*.safetensors")]


# --------------------------------------------------------------------------------------------------------------------
# what can't be read


@contextlib.contextmanager
def no_longer_than(seconds):
    """Fail where something waits for ever, in place of hanging with it."""

    def late(*_):
        raise AssertionError(f"it hangs: nothing in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "webp", "gif", "jpg", "tif", "bmp", "avif"])
def test_damaged_pictures(kind, tmp_path):
    """Cut off or changed anywhere, a picture is read or is a ValueError of one sentence; --image's has its name."""
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (90, 90, 3), dtype=np.uint8))
    file, refused = tmp_path / f"a.{kind}", 0
    noise.save(file, **(dict(save_all=True, append_images=[noise.rotate(90)]) if kind in ("gif", "webp") else {}))
    data, random = file.read_bytes(), np.random.RandomState(1)
    damaged = [data[:n] for n in random.randint(0, len(data), 20)] + [b"", data[:9], data[:30], data[:45]]
    for place in [*random.randint(0, 60, 20), *random.randint(0, len(data), 20)]:
        damaged.append(data[:place] + bytes(random.randint(0, 255, 4, dtype=np.uint8)) + data[place + 4 :])
    for damage in damaged:
        file.write_bytes(damage)
        for read in (read_image, lambda file: read_frames(file, size())):
            try:
                read(file)
            except ValueError as error:
                refused += 1
                assert str(error) and (read is not read_image or str(file) in str(error)), error
    assert refused > 20


@pytest.mark.parametrize("error", [
    SyntaxError("broken PNG file"), struct.error("unpack"), EOFError(), Image.DecompressionBombError("large"),
    ZeroDivisionError("x"), OSError("truncated"), KeyError("tag"), ValueError("Truncated IHDR chunk"), NotImplementedError(),
    av.error.InvalidDataError(1, "x"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_whatever_a_library_raises(error, tmp_path):
    """Skips that file, with a sentence."""
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.mp4").write_bytes(b"x")
    with mock.patch.object(Image, "open", side_effect=error), mock.patch.object(av, "open", side_effect=error):
        for read in (read_image, lambda file: read_frames(file, size())):
            with pytest.raises(ValueError, match="is not an image") as raised:
                read(tmp_path / "a.png")
        assert "it is not an image that can be read: " in str(raised.value)
        for file in ("a.png", "a.mp4"):
            entry = Entry(tmp_path / file, file, "x")
            args = SimpleNamespace(output=tmp_path, **vars(size()))
            outcome, _ = encode_one(entry, full.encode.size_of(entry.file), None, None, dict(kind=None), args)
            assert re.match(f"skipping .*{file}: it is not an? (image|video) that can be read: .", outcome)


@pytest.mark.parametrize("name, data", [
    ("clip.nfo", b"some words about the film\n" * 50), ("clip.srt", b"1\n00:00:00,000 --> 00:00:01,000\nhello\n"),
    ("clip.json", b"{}" * 99), ("clip.mp4", b""), ("clip", b"\0" * 999),
])  # fmt: skip
def test_what_is_no_video(name, data, tmp_path):
    """Neither is a text drawn as one."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="it has no video|it is not a video that can be read"):
        read_frames(tmp_path / name, size())


def test_a_phone_s_picture_is_not_read_by_its_tiles(tmp_path):
    """HEIC: each of its tiles is a video stream."""
    data = video(tmp_path / "a.mp4", numbered(5)).read_bytes()
    (tmp_path / "a.heic").write_bytes(data.replace(b"ftypisom", b"ftypheic", 1))
    assert data[4:12] == b"ftypisom"
    with pytest.raises(ValueError, match="it is a HEIC picture, of which one tile would be read: save it as .jpg"):
        read_frames(tmp_path / "a.heic", size())


@pytest.mark.parametrize(
    "mode, seen", [("CMYK", (200, 60, 30)), ("L", (90, 90, 90)), ("1", (255, 255, 255)), ("P", (204, 51, 0))]
)
def test_kinds_of_pictures(mode, seen, tmp_path):
    """Are RGB, and upright."""
    picture = Image.new("RGB", (32, 16), seen).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone's, held upright
    name = tmp_path / ("a.jpg" if mode in ("CMYK", "L") else "a.png")
    picture.save(name, exif=exif)
    image = read_image(name)
    assert (image.mode, image.size) == ("RGB", (16, 32))
    assert max(abs(x - y) for x, y in zip(image.getpixel((8, 8)), seen)) <= 3
    Image.new("I;16", (16, 16)).save(tmp_path / "deep.png")
    for read in (read_image, lambda file: read_frames(file, size())):
        with pytest.raises(ValueError, match="deep.png has 16 or 32 bits a channel"):
            read(tmp_path / "deep.png")


# --------------------------------------------------------------------------------------------------------------------
# what is in a folder


def listed(folder):
    """Return {path in the folder: its caption, or [its problem]}, and the files that are not used."""
    entries, unused = videos_and_captions(folder)
    found = {os.path.relpath(e.file, folder): [e.problem] if e.problem else e.caption for e in entries}
    assert len(found) == len(entries)
    return found, [os.path.relpath(file, folder) for file in unused]


def fill(folder, *names, table=(), **texts):
    """Files without content, captions.jsonl of rows (or of lines as bytes), and NAME.txt of text or bytes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    if table:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in table]
        (folder / "captions.jsonl").write_bytes(b"\n".join(lines))


def row(file, caption):
    return dict(file=file, caption=caption)


@pytest.mark.parametrize("caption, said", [
    (None, "null"), (["a", "b"], r'\["a", "b"\]'), (7, "7"), ({"en": "a"}, r'\{"en": "a"\}'), (True, "true"), (1.5, "1.5"),
    ("half \ud83d", r'"half \\\\ud83d"'), ("\udc00", r'"\\\\udc00"'),
], ids=str)  # fmt: skip
def test_a_caption_that_is_not_text(caption, said, tmp_path):
    """Is refused by its line; the rest is made."""
    fill(tmp_path, "a.mp4", "b.mp4", table=[row("b.mp4", "fine \U0001f408"), row("a.mp4", caption)])
    found, _ = listed(tmp_path)
    assert found["b.mp4"] == "fine \U0001f408"
    assert re.fullmatch(
        f"its caption in line 2 of captions.jsonl is {said}, which is not text", found["a.mp4"][0].replace("\\", "\\\\")
    )


@pytest.mark.parametrize("line", [
    b"no JSON", b"[1]", b"{}", b"null", b'{"file": "a.mp4"}', b'{"caption": "x"}', b'{"file": 7, "caption": "x"}',
    b'{"file": null, "caption": "x"}', b"[" * 10**5, b'{"file": "a.mp4", "caption": "caf\xe9"}', b'"\xff"',
])  # fmt: skip
def test_a_line_that_is_no_caption(line, tmp_path):
    fill(
        tmp_path, "b.mp4", table=[b"\xef\xbb\xbf" + json.dumps(row("b.mp4", "fine")).encode() + b"\r", b"", b"  ", line]
    )
    found, _ = listed(tmp_path)
    assert found == {"b.mp4": "fine", "captions.jsonl, line 4": ['it is not {"file": .., "caption": ..}']}


def test_lines_are_cut_at_line_feeds_alone(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
    raw = json.dumps(row("a.mp4", "one\u2028two\u2029three\x85four"), ensure_ascii=False).encode()
    fill(tmp_path, "a.mp4", "b.mp4", "c.mp4", table=[raw, row("b.mp4", text), b'{"file": "c.mp4",\r"caption": "c"}'])
    assert listed(tmp_path)[0] == {"a.mp4": "one\u2028two\u2029three\x85four", "b.mp4": text, "c.mp4": "c"}


def test_files_outside_the_folder_are_refused(tmp_path):
    folder = tmp_path / "videos"
    fill(folder, "a.mp4", "b/c.mp4", "..d/e.mp4", "../f.mp4", "../videos2/g.mp4")
    (tmp_path / "link").symlink_to(folder)
    names = ["../f.mp4", str(tmp_path / "f.mp4"), "b/../../f.mp4", "/etc/passwd", "../videos2/g.mp4", ".", ""]
    inside = ["b/../a.mp4", str(folder / "b/c.mp4"), "./..d/e.mp4"]
    fill(folder, table=[row(name, f"of {name}") for name in names + inside])
    for place in (folder, tmp_path / "link"):
        found, unused = listed(place)
        assert {path: said for path, said in found.items() if isinstance(said, str)} == {
            "a.mp4": "of b/../a.mp4", "b/c.mp4": f"of {folder}/b/c.mp4", "..d/e.mp4": "of ./..d/e.mp4",
        }  # fmt: skip
        for n, name in enumerate(names, 1):
            assert found[f"captions.jsonl, line {n}"] == [f"{name} is not in {place}"]
        assert unused == []


def test_two_captions_of_one_file(tmp_path):
    """Are refused with both places: neither may win unseen. What says the same twice is one."""
    table = [
        row("a.mp4", "first"),
        row("c.mp4", "c"),
        row("./a.mp4", "second"),
        row("b.mp4", "line"),
        row("d.mp4", "same"),
    ]
    table += [row("c.mp4", "c"), row("a.mp4", "first"), row("e.mp4", None), row("e.mp4", "e")]
    fill(tmp_path, *(f"{name}.mp4" for name in "abcde"), table=table, b="text", d="same\n")
    found, _ = listed(tmp_path)
    lines = [f"in line {n} of captions.jsonl" for n in range(10)]
    assert found == {
        "a.mp4": [f'it has 3 captions: "first" {lines[1]}, "second" {lines[3]}, "first" {lines[7]}'],
        "b.mp4": [f'it has 2 captions: "line" {lines[4]}, "text" in b.txt'],
        "c.mp4": "c",
        "d.mp4": "same",
        "e.mp4": [f'it has 2 captions: null {lines[8]}, "e" {lines[9]}'],
    }


def test_what_is_tried_and_what_is_not_used(tmp_path):
    """Whatever has a caption, in subfolders too, and what has the ending of a video; all else is named."""
    fill(
        tmp_path,
        "a.mp4",
        "A.MOV",
        "b.avi",
        "sub/deep/c.m4v",
        "sub/d.gif",
        "e",
        "f.xyz",
        "g.bmp",
        "x.zip",
        "sub/y",
        "caption.srt",
    )
    fill(
        tmp_path,
        ".DS_Store",
        ".hidden/a.mp4",
        "._a.mp4",
        "old.safetensors",
        "n.mp4",
        "sub/captions.jsonl",
        "dir.mp4/x.mp4",
    )
    fill(tmp_path, table=[row("sub/d.gif", "d"), row("f.xyz", "f"), row("gone.mp4", "gone"), row("sub", "folder")],
         a="a", b="b", e="e", g="g", lone="x", **{"sub/deep/c": "c", "dir.mp4/x": "x"})  # fmt: skip
    (tmp_path / "loop").symlink_to(tmp_path)
    with no_longer_than(20):
        found, unused = listed(tmp_path)
    assert found == {
        "A.MOV": ["there is no A.txt, and no line for it in captions.jsonl"],
        "a.mp4": "a", "b.avi": "b", "e": "e", "f.xyz": "f", "g.bmp": "g", "sub/d.gif": "d", "sub/deep/c.m4v": "c",
        "dir.mp4/x.mp4": "x",
        "n.mp4": ["there is no n.txt, and no line for it in captions.jsonl"],
        "gone.mp4": ["there is no such file"],
        "sub": ["it is not a regular file"],
    }  # fmt: skip
    assert unused == ["caption.srt", "lone.txt", "loop", "sub/captions.jsonl", "sub/y", "x.zip"]


def test_what_can_not_be_read_is_named_and_the_rest_is_made(tmp_path):
    """A caption of another encoding, a pipe in any place: named, never opened."""
    fill(
        tmp_path,
        "a.mp4",
        "b.mp4",
        "c.mp4",
        "d.mp4",
        a="fine",
        b="caf\xe9".encode("latin-1"),
        c="größe 猫".encode("utf-16"),
    )
    for name in ("d.txt", "e.mp4", "f", "g.pipe", "captions.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    fill(tmp_path, e="e", f="f", zero="zero")
    with no_longer_than(20):
        found, unused = listed(tmp_path)
        assert [full.encode.size_of(tmp_path / name) for name in ("e.mp4", "zero.mp4", "none")] == [None] * 3
    assert found.pop("a.mp4") == "fine" and "b.txt is not a text file: 'utf-8' codec" in found.pop("b.mp4")[0]
    assert "c.txt is not a text file" in found.pop("c.mp4")[0] and found.pop("d.mp4") == ["d.txt is not a regular file"]
    assert found == {name: ["it is not a regular file"] for name in ("captions.jsonl", "e.mp4", "f", "zero.mp4")}
    assert unused == ["g.pipe"]


def test_a_folder_that_can_not_be_opened(tmp_path):
    """Is named, and the rest is read."""
    fill(tmp_path, "a.mp4", "closed/b.mp4", a="a")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with mock.patch.object(os, "scandir", closed):
        assert listed(tmp_path) == ({"a.mp4": "a"}, ["closed"])


def test_a_file_with_a_problem_is_not_touched(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    entry = Entry(tmp_path / "a.mp4", "a.mp4", problem="it is not a regular file")
    (tmp_path / "a.mp4.safetensors").write_bytes(b"older")
    with no_longer_than(20):
        outcome, _ = encode_one(entry, None, None, None, dict(kind=None), SimpleNamespace(output=tmp_path))
    target = tmp_path / "a.mp4.safetensors"
    assert outcome == f"skipping {entry.file}: it is not a regular file ({target}, made before, is kept)"


def test_names_of_samples():
    """A flat folder's are what they were; no two paths have the same; none is hidden or the empty prompt's."""
    for name in ("clip.mp4", "a b.mov", "50%.png", "größe 猫.mp4", "a-clip.mp4", "100%25.gif", "x" * 200):
        assert sample_name(name) == name
    assert sample_name("a/clip.mp4") == "a%2Fclip.mp4" and sample_name(".a/b") == "%2Ea%2Fb"
    parts = ["a", "/", "%", "2", "5", "F", "E", "."]
    paths = {
        "".join(parts[i] for i in np.base_repr(n, 8).zfill(5) and map(int, np.base_repr(n, 8).zfill(5)))
        for n in range(8**5)
    }
    paths |= {
        f"{a}{b}{c}"
        for a in (".", "%2E", "%252E", "%25252E")
        for b in ("/", "%2F", "%252F", "%25252F")
        for c in ("", "/", "%2F")
    }
    names = {sample_name(path) for path in paths}
    assert len(names) == len(paths) and not [name for name in names if name[0] == "." or "/" in name]
    for name in ("x" * 221, "empty_prompt", "caf\udce9.mp4"):
        with pytest.raises(ValueError):
            sample_name(name)


def test_a_folder_that_holds_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.mp4, .*and nothing that has a caption"):
        videos_and_captions(tmp_path)
    with pytest.raises(ValueError, match="none is not a folder"):
        videos_and_captions(tmp_path / "none")
    fill(tmp_path, table=[b"no JSON"])  # which is worth saying
    assert [*listed(tmp_path)[0]] == ["captions.jsonl, line 1"]


# --------------------------------------------------------------------------------------------------------------------
# as a user types it


def test_a_folder_as_people_have_them(snapshot, tmp_path):
    """Everything odd in one folder: what can be is made, with the right pixels and captions; all else is named; a second run
    makes nothing anew, says the same again, and names what has lost its source."""
    videos, out = tmp_path / "videos", tmp_path / "latents"
    fill(
        videos,
        "notes.pdf",
        "empty.mp4",
        **{name: "" for name in ("blank",)},
        empty="e",
        pipe="p",
        latin=b"caf\xe9",
        cut="c",
        small="s",
    )
    moving = [flat((40 + 3 * n, 90, 200 - n), 64, 96) for n in range(30)]
    for place in ("a", "b"):
        (videos / place).mkdir()
        video(videos / place / "clip.mp4", [flat(90 if place == "a" else 200, 64, 96)] * 5)
    video(videos / "blank.mov", moving[:9])
    video(videos / "latin.mp4", moving[:9])
    video(videos / "number.mp4", moving[:9])
    video(videos / "small.avi", [flat(90, 32, 48)] * 3, codec="mpeg4", pix="yuv420p")
    noise = [np.random.RandomState(n).randint(0, 255, (64, 96, 3), dtype=np.uint8) for n in range(24)]
    data = video(videos / "cut.mkv", noise).read_bytes()
    (videos / "cut.mkv").write_bytes(data[: len(data) // 4])
    first, *rest = (Image.fromarray(frame) for frame in moving[:6])
    first.save(videos / "moves.gif", save_all=True, append_images=rest, duration=100)
    os.mkfifo(videos / "pipe.mp4")
    rows = [
        row("a/clip.mp4", "clip a"),
        row("b/clip.mp4", "clip b"),
        row("moves.gif", "it moves"),
        row("number.mp4", 7),
        row("../x.mp4", "x"),
    ]
    fill(videos, table=rows)
    flags = f"--model {snapshot} --videos {videos} --output {out} --height 64 --width 96 --frames 9".split()
    (videos / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"")  # a name of another encoding
    ((code, printed),) = fork("full.encode", *flags, out=tmp_path)
    assert code == 0 and "wrote 5 samples" in printed and "0 existed already, 7 skipped" in printed, printed
    samples = {}
    for file in out.glob("*.safetensors"):
        with full.encode.open_safetensors(file) as handle:
            made_by = (handle.metadata() or {}).get("made_by")
        if made_by:
            samples[file.name.removesuffix(".safetensors")] = json.loads(made_by)["caption"], load_file(file)["latents"]
    assert {name: caption for name, (caption, _) in samples.items()} == {
        "a%2Fclip.mp4": "clip a", "b%2Fclip.mp4": "clip b", "blank.mov": "", "moves.gif": "it moves", "small.avi": "s",
    }  # fmt: skip
    assert [samples[name][1].shape[1] for name in ("a%2Fclip.mp4", "moves.gif", "small.avi", "blank.mov")] == [
        2,
        3,
        1,
        3,
    ]
    assert (samples["a%2Fclip.mp4"][1] - samples["b%2Fclip.mp4"][1]).abs().max() > 1e-3
    skipped = [
        "captions.jsonl, line 5: ../x.mp4 is not in",
        "empty.mp4: it is not a video",
        "pipe.mp4: it is not a regular file",
        "latin.mp4: .*latin.txt is not a text file",
        "cut.mkv: it is cut off: 0...",
        "number.mp4: its caption in line 4 .* is 7",
        "caf.udce9.mp4: 'utf-8' codec",
    ]
    for said in skipped:
        assert re.search(f"skipping .*{said}", printed), (said, printed)
    known = [
        r"^not used \(1\): .*notes.pdf$",
        r"^with an empty caption \(1\): .*blank.mov$",
        r"^enlarged \(1\): .*small.avi$",
        r"^longer than the 0.38 s that are used \(1\): .*moves.gif$",
        r"^of one frame, being shorter than 5 \(1\): .*small.avi$",
    ]
    assert all(re.search(line, printed, re.M) for line in known) and "any more" not in printed, printed
    Folder(Snapshot(snapshot).config, out)

    (videos / "blank.mov").rename(videos / "named.mov")
    ((code, printed),) = fork("full.encode", *flags, out=tmp_path)
    assert code == 0 and "wrote 0 samples" in printed and "4 existed already, 8 skipped" in printed, printed
    assert re.search(
        r"^not in .*videos any more, but training uses them until you delete them \(1\): .*latents/blank.mov.safetensors$",
        printed,
        re.M,
    )
    assert re.search(r"^not used \(2\): .*blank.txt, .*notes.pdf$", printed, re.M), printed
    assert all(re.search(line, printed, re.M) for line in known[2:]), printed
