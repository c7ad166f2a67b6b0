"""latent.video: what was put in comes out of the file, which is whole or absent."""

import errno
import gc
import os
from contextlib import contextmanager

import av
import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib.cli import UserError
from dnnlib.files import TEMPORARY
from latent.video import Film, Video, check_film, parse_formats, tile
from tests.helpers.explore_commands import frames_of

COLORS = [(230, 40, 40), (40, 160, 60), (30, 60, 200), (245, 245, 245), (8, 8, 8)]


def quarters(index, channels=3, height=64, width=64):
    """Return a frame of four colors, another order in each frame: uint8 [channels, height, width]."""
    frame = torch.zeros([3, height, width], dtype=torch.uint8)
    for number in range(4):
        rows, columns = (slice(None, size // 2) if first else slice(size // 2, None)
                         for size, first in ((height, number < 2), (width, number % 2 == 0)))
        color = torch.tensor(COLORS[(index + number) % len(COLORS)], dtype=torch.uint8)
        frame[:, rows, columns] = color[:, None, None]
    return frame[:channels]


def write(path, frames, **settings):
    with Video(path, **settings) as video:
        for frame in frames:
            video.add(frame)


def decode(path):
    """Return the frames of a file, uint8 [H, W, 3] each, and its stream."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [to_rgb(frame.to_ndarray()) for frame in container.decode(stream)], stream


def to_rgb(planes):
    """Apply BT.709 (Rec. ITU-R BT.709-6, items 3.3 to 3.5) to the planes of yuv420p: uint8 [3 H / 2, W]."""
    height, width = len(planes) * 2 // 3, planes.shape[1]
    light = (planes[:height] - 16.0) / 219
    blue, red = ((plane.reshape(height // 2, width // 2).repeat(2, axis=0).repeat(2, axis=1) - 128.0) / 224
                 for plane in np.split(planes[height:].ravel(), 2))
    r, b = light + 2 * (1 - 0.2126) * red, light + 2 * (1 - 0.0722) * blue
    g = (light - 0.2126 * r - 0.0722 * b) / 0.7152
    return (np.stack([r, g, b], axis=2) * 255).round().clip(0, 255).astype(np.uint8)


def enlarged(frame, factor):
    return frame.expand(3, -1, -1).permute(1, 2, 0).numpy().repeat(factor, axis=0).repeat(factor, axis=1)


def check_quarters(pixels, expected):
    """Check each quarter off its edges: the color's mean within 3 levels, every pixel within 20."""
    height, width = expected.shape[0] // 2, expected.shape[1] // 2
    for top in (0, height):
        for left in (0, width):
            part = slice(top + 8, top + height - 8), slice(left + 8, left + width - 8)
            differences = pixels[part].astype(float) - expected[part]
            assert abs(differences.mean(axis=(0, 1))).max() < 3
            assert abs(differences).max() < 20


@pytest.mark.parametrize(("channels", "height", "width", "factor"), [
    (3, 64, 64, 4), (1, 32, 32, 8), (3, 100, 40, 3), (3, 256, 520, 1), (3, 512, 512, 1), (1, 300, 64, 1),
])
def test_video_frames_come_back(tmp_path, channels, height, width, factor):
    frames = [quarters(index, channels, height, width) for index in range(7)]
    write(tmp_path / "proj.mp4", frames)
    found, stream = decode(tmp_path / "proj.mp4")
    assert (len(found), stream.frames) == (7, 7)
    for pixels, frame in zip(found, frames):
        assert pixels.shape == (height * factor, width * factor, 3)
        check_quarters(pixels, enlarged(frame, factor))


@pytest.mark.parametrize(("height", "width", "shape"), [
    (257, 301, (258, 302)), (51, 51, (306, 306)), (1, 1, (256, 256)),
])
def test_video_odd_sizes_repeat_the_last_line(tmp_path, height, width, shape):
    frame = torch.full([3, height, width], 30, dtype=torch.uint8)
    frame[:, -1] = frame[:, :, -1] = 220
    write(tmp_path / "proj.mp4", [frame])
    (found,), _ = decode(tmp_path / "proj.mp4")
    assert found.shape == (*shape, 3)
    assert abs(found[-1].astype(int) - 220).max() <= 8
    assert abs(found[:, -1].astype(int) - 220).max() <= 8


def test_video_is_what_players_expect(tmp_path):
    path = tmp_path / "proj.mp4"
    write(path, [quarters(index) for index in range(20)], frames_per_second=10)
    _, stream = decode(path)
    context = stream.codec_context
    assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    assert (stream.average_rate, float(stream.duration * stream.time_base)) == (10, 2.0)
    # BT.709 of limited range, said in the file.
    assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    data = path.read_bytes()
    assert data[4:8] == b"ftyp"
    assert data.index(b"moov") < data.index(b"mdat")


def test_video_detail_of_small_images_survives(tmp_path):
    """A drawn lesion of 64x64: no pixel is lost between its neighbors."""
    places = torch.arange(64.0)
    inner = ((places[:, None] - 30) ** 2 + (places - 34) ** 2 < 200).float()
    skin = torch.stack([220 - 120 * inner, 170 - 110 * inner, 150 - 90 * inner])
    frame = (skin + 6 * torch.randn(skin.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    write(tmp_path / "proj.mp4", [frame] * 3)
    for found in decode(tmp_path / "proj.mp4")[0]:
        means = found.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        differences = abs(means - frame.permute(1, 2, 0).numpy())
        assert differences.mean() < 4  # 2.8 measured; the noise alone has 4.8
        assert differences.max() < 40


def test_video_without_libx264_is_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4", "h264"})
    frames = [quarters(index) for index in range(4)]
    write(tmp_path / "proj.mp4", frames)
    found, stream = decode(tmp_path / "proj.mp4")
    assert (stream.codec_context.name, len(found)) == ("mpeg4", 4)
    for pixels, frame in zip(found, frames):
        check_quarters(pixels, enlarged(frame, 4))


def test_video_says_nothing(tmp_path, capfd):
    write(tmp_path / "proj.mp4", [quarters(0)] * 3)
    assert capfd.readouterr() == ("", "")


def test_video_old_file_stays_until_the_end_and_is_replaced(tmp_path):
    path = tmp_path / "proj.mp4"
    path.write_bytes(b"old")
    with Video(path) as video:
        video.add(quarters(0))
        assert path.read_bytes() == b"old"
        (temporary,) = (name for name in os.listdir(tmp_path) if name != "proj.mp4")
        assert TEMPORARY.fullmatch(temporary)
    assert len(decode(path)[0]) == 1
    assert os.listdir(tmp_path) == ["proj.mp4"]


@pytest.mark.parametrize("name", ["a%03d:b.mp4", "m\u00e9l \u75e3.mp4", "no ending", "-i.mp4"])
def test_video_any_name_is_kept(tmp_path, name):
    write(tmp_path / name, [quarters(0)] * 2)
    assert os.listdir(tmp_path) == [name]
    assert len(decode(tmp_path / name)[0]) == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, FileNotFoundError])
@pytest.mark.parametrize("frames", [0, 1, 80])  # the encoder keeps some back
@pytest.mark.parametrize("existing", [True, False])
def test_video_error_leaves_nothing_behind(tmp_path, error, frames, existing):
    path = tmp_path / "proj.mp4"
    if existing:
        path.write_bytes(b"old")
    raised = error("of the caller")

    def fail_halfway():
        with Video(path) as video:
            for index in range(frames):
                video.add(quarters(index, height=16, width=16))
            raise raised

    gc.collect()  # what earlier tests left would be closed at any moment
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    with pytest.raises(error) as caught:
        fail_halfway()
    assert caught.value is raised
    assert os.listdir(tmp_path) == (["proj.mp4"] if existing else [])
    assert not existing or path.read_bytes() == b"old"
    assert not before or len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize(("frame", "message"), [
    (quarters(0, height=32), r"frame 1 is \[3, 32, 64\]; expected \[3, 64, 64\] like the first"),
    (quarters(0, channels=1), r"frame 1 is \[1, 64, 64\]; expected \[3, 64, 64\] like the first"),
    (quarters(0).float(), r"a frame is torch.float32 \[3, 64, 64\]; expected uint8 \[1 or 3, H, W\]"),
    (quarters(0)[None], r"a frame is torch.uint8 \[1, 3, 64, 64\]; expected uint8 \[1 or 3, H, W\]"),
    (quarters(0)[:2], r"a frame is torch.uint8 \[2, 64, 64\]; expected uint8 \[1 or 3, H, W\]"),
])
def test_video_frame_of_another_kind_raises_and_leaves_nothing(tmp_path, frame, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        write(tmp_path / "proj.mp4", [quarters(0), frame])
    assert os.listdir(tmp_path) == []


def test_video_without_frames_raises_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"proj\.mp4 has no frames; expected one or more$"):
        write(tmp_path / "proj.mp4", [])
    assert os.listdir(tmp_path) == []


def test_video_frames_per_second_below_one_raises(tmp_path):
    with pytest.raises(ValueError, match=r"^frames_per_second is 0; expected 1 or more$"):
        Video(tmp_path / "proj.mp4", frames_per_second=0)


def test_video_missing_folder_raises_with_the_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path / "none" / "proj.mp4", [quarters(0)])
    assert caught.value.filename == str(tmp_path / "none" / "proj.mp4")


def test_video_folder_as_target_raises_with_the_name(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        write(tmp_path, [quarters(0)])
    assert (caught.value.errno, caught.value.filename) == (errno.EISDIR, str(tmp_path))


@contextmanager
def largest_file(size):
    """Refuse to write beyond `size` bytes of a file, as a full disk does."""
    import resource  # POSIX systems have it

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.name != "posix", reason="limits on the size of files are those of POSIX systems")
@pytest.mark.parametrize("count", [1, 60])  # all written at the end, or on the way
def test_video_full_disk_raises_at_any_place_and_leaves_nothing(tmp_path, capfd, count):
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator) for _ in range(count)]
    path = tmp_path / "proj.mp4"
    write(path, frames)
    size = path.stat().st_size
    path.unlink()
    for limit in [0, 100, 1000, size // 2, size - 200, size - 1] if count == 1 else [1000]:
        with pytest.raises(OSError) as caught, largest_file(limit):
            write(path, frames)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
        assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_webp_frames_come_back_in_time(tmp_path):
    frames = [quarters(index) for index in range(7)]
    write(tmp_path / "film.webp", frames, form="webp", frames_per_second=20)
    found, seconds = frames_of(tmp_path / "film.webp")
    assert (len(found), seconds) == (7, pytest.approx(0.35))
    for pixels, frame in zip(found, frames):
        check_quarters(pixels, enlarged(frame, 4))


def test_webp_repeats_forever_and_shows_equal_frames_longer(tmp_path):
    write(tmp_path / "film.webp", [quarters(0)] * 5 + [quarters(1)], form="webp", frames_per_second=10)
    with PIL.Image.open(tmp_path / "film.webp") as film:
        assert (film.format, film.n_frames, film.info["loop"]) == ("WEBP", 2, 0)
    assert frames_of(tmp_path / "film.webp")[1] == pytest.approx(0.6)


def test_webp_gray_frames_are_gray(tmp_path):
    write(tmp_path / "film.webp", [quarters(index, channels=1) for index in range(2)], form="webp")
    for pixels in frames_of(tmp_path / "film.webp")[0]:
        assert np.ptp(pixels.astype(int), axis=2).max() <= 2


@pytest.mark.parametrize("existing", [True, False])
def test_film_writes_all_formats_or_none(tmp_path, existing):
    files = {"film.mp4", "film.webp"}
    for name in files if existing else ():
        (tmp_path / name).write_bytes(b"old")

    def fail_halfway():
        with Film(tmp_path / "film", ["mp4", "webp"]) as film:
            film.add(quarters(0))
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(files if existing else (),
                                                                                          b"old")
    with Film(tmp_path / "film", ["mp4", "webp"], frames_per_second=5) as film:
        for index in range(3):
            film.add(quarters(index))
    assert film.paths == [tmp_path / "film.mp4", tmp_path / "film.webp"]
    for path in film.paths:
        found, seconds = frames_of(path)
        assert (len(found), seconds) == (3, pytest.approx(0.6))
    assert {path.name for path in tmp_path.iterdir()} == files


def test_film_equal_frames_give_equal_files(tmp_path):
    for name in "ab":
        with Film(tmp_path / name, ["mp4", "webp"]) as film:
            for index in range(20):
                film.add(quarters(index))
    for form in ("mp4", "webp"):
        assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()


def test_tile_leaves_missing_cells_white():
    first, second, third = (quarters(index, height=2, width=2) for index in range(3))
    assert torch.equal(tile([first]), first)
    found = tile([first, second, third])
    assert torch.equal(found[:, :2], torch.cat([first, second], 2))
    assert torch.equal(found[:, 2:], torch.cat([third, torch.full_like(third, 255)], 2))
    wide = [quarters(index, height=2, width=8) for index in range(4)]  # one below the other, near to a square
    assert torch.equal(tile(wide), torch.cat(wide, 1))


def test_formats_are_parsed_each_once():
    assert parse_formats("webp, MP4,webp") == ["webp", "mp4"]


@pytest.mark.parametrize("text", ["gif", "mp4,gif"])
def test_formats_unknown_is_refused(text):
    with pytest.raises(UserError, match=r"^--formats has 'gif'; expected mp4 or webp, or both separated by a comma$"):
        parse_formats(text)


def test_formats_without_encoder_is_refused(monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"libx264"})
    assert parse_formats("mp4") == ["mp4"]
    with pytest.raises(UserError, match=r"^--formats has webp, but the installed PyAV cannot write it; expected the "
                                        r"other format$"):
        parse_formats("mp4,webp")


@pytest.mark.parametrize(("fps", "width", "height", "message"), [
    (0, 64, 64, "--fps is 0; expected 1 to 240 frames per second, usually 30"),
    (241, 64, 64, "--fps is 241; expected 1 to 240 frames per second, usually 30"),
    (30, 5000, 64, "a frame of the film would be 20000x256 pixels; expected at most 16383 each way: show fewer films "
     "in one"),
    (30, 300, 16384, "a frame of the film would be 300x16384 pixels; expected at most 16383 each way: show fewer films "
     "in one"),
])
def test_film_that_cannot_be_written_is_refused(fps, width, height, message):
    with pytest.raises(UserError) as caught:
        check_film(fps, width, height)
    assert str(caught.value) == message
    check_film(30, 16383, 256)
