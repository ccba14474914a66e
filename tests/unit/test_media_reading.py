"""Bad images and sounds are named before training; good ones are read the same whatever form they come in."""

import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image

from lora_ft.media import find_media, image_size, read_image, read_mask, read_sound, sound_info, write_mask

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)


def png(mode="RGB", size=(16, 12), **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).resize(size).save(file, "PNG", **options)
    return file.getvalue()


def wav(sound, rate=16000, subtype="PCM_16", format="WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, subtype=subtype, format=format)
    return file.getvalue()


def bomb(width, height) -> bytes:
    """A PNG whose header promises more pixels than any machine has."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IHDR" + header
    chunk = struct.pack(">I", len(header)) + body + struct.pack(">I", zlib.crc32(body))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk
        + chunk[:0]
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.png").write_bytes(png())
    (folder / "good.wav").write_bytes(wav(np.zeros(800) + 0.1))
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("god.png", "did you mean 'good.png'"),
        ("sub/good.png", "there is no folder sub"),
        ("empty.png", "0 bytes"),
        ("folder.png", "a folder"),
        ("../secret.png", "outside of the data's folder"),
        ("link.png", "outside of the data's folder"),
        ("/etc/hostname", "media_root"),
        ("https://example.org/x.png", "nothing is downloaded"),
        ("data:image/png;base64,AAAA", "nothing is downloaded"),
        (b"", "0 bytes"),
        (None, "NoneType"),
        ({"other": 1}, "allowed: bytes, path, array"),
        ([[1, 2], [3]], "different lengths"),
        (np.zeros((0, 3)), "empty array"),
    ],
)
def test_what_is_no_image_below_the_root_is_refused(root, value, says):
    with pytest.raises(ValueError, match=says):
        find_media(value, "image", str(root))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"this is text", "no image that can be read"),
        (png()[:200], "damaged or truncated"),
        (png()[:40] + b"\xff" * 60 + png()[100:], "a damaged PNG image"),
        (png()[:60] + b"\xff" * 60 + png()[120:], "damaged"),
        (bomb(60000, 60000), "pixels"),
        (bomb(12000, 9000), "108,000,000 pixels, allowed 50,000,000"),
    ],
)
def test_a_damaged_or_giant_image_is_refused_and_nothing_global_changes(content, says):
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    with pytest.raises(ValueError, match=says):
        read_image(find_media(content, "image", ""))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_a_limit_of_pixels_is_the_callers():
    media = find_media(png(), "image", "")
    assert read_image(media, 16 * 12).size == (16, 12)
    with pytest.raises(ValueError, match=r"data\.max_pixels"):
        read_image(media, 16 * 12 - 1)


def test_a_photo_taken_upright_stands_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    media = find_media(file.getvalue(), "image", "")
    assert image_size(media) == read_image(media).size == (12, 16)
    assert np.array_equal(np.asarray(read_image(media)), np.rot90(PIXELS, -1))


def test_transparent_parts_are_white_and_other_modes_are_colours():
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    file = io.BytesIO()
    Image.fromarray(clear).save(file, "PNG")
    assert (np.asarray(read_image(find_media(file.getvalue(), "image", ""))) == 255).all()
    for mode in ("L", "P", "1", "LA", "RGBA"):
        assert read_image(find_media(png(mode), "image", "")).mode == "RGB"
    deep = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(deep, "PNG")
    found = np.asarray(read_image(find_media(deep.getvalue(), "image", "")))
    assert np.allclose(found[..., 0].ravel(), np.linspace(0, 255, 64), atol=0.6)


@pytest.mark.parametrize(
    "array",
    [PIXELS, PIXELS.transpose(2, 0, 1), PIXELS / 255.0, PIXELS.astype(np.int64), PIXELS.tolist()],
    ids=["uint8", "channels first", "shares of 1", "int64", "lists"],
)
def test_an_array_is_the_image_that_a_file_is(array):
    for value in (array, {"array": array}):
        media = find_media(value, "image", "")
        assert image_size(media) == (16, 12)
        assert np.array_equal(np.asarray(read_image(media)), PIXELS)
    assert np.array_equal(np.asarray(read_image(find_media(Image.fromarray(PIXELS), "image", ""))), PIXELS)
    assert np.array_equal(np.asarray(read_image(find_media({"bytes": png(), "path": None}, "image", ""))), PIXELS)


@pytest.mark.parametrize("array", [np.zeros((4, 4, 2)), np.full((4, 4), -1.0), np.full((4, 4), np.nan), np.zeros(5)])
def test_an_array_that_is_no_image_is_refused(array):
    with pytest.raises(ValueError, match="image"):
        read_image(find_media(array, "image", ""))


def test_a_mask_keeps_its_class_ids(tmp_path):
    for top in (7, 300):
        ids = RNG.integers(0, top, (9, 5))
        write_mask(tmp_path / "m.png", ids)
        assert np.array_equal(read_mask(find_media("m.png", "image", str(tmp_path))), ids)
    with pytest.raises(ValueError, match="a mask of colours"):
        read_mask(find_media(png(), "image", ""))


@pytest.mark.parametrize(
    ("subtype", "format"), [("PCM_16", "WAV"), ("PCM_24", "WAV"), ("FLOAT", "WAV"), ("PCM_16", "FLAC")]
)
def test_sound_is_read_from_every_form(subtype, format):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(1600) / 16000)
    media = find_media(wav(wave, 16000, subtype, format), "audio", "")
    assert sound_info(media) == (0.1, 16000)
    assert np.abs(read_sound(media, 16000) - wave).max() < 1e-4
    stereo = find_media(wav(np.stack([wave, -wave], 1), 16000, subtype, format), "audio", "")
    assert np.abs(read_sound(stereo, 16000)).max() < 1e-4


def test_a_resampled_sine_is_the_sine_at_the_new_rate():
    for own, rate in ((8000, 16000), (44100, 16000)):
        wave = 0.5 * np.sin(2 * np.pi * 300 * np.arange(own) / own)
        found = read_sound(find_media({"array": wave, "sampling_rate": own}, "audio", ""), rate)
        wanted = 0.5 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)
        assert len(found) == rate
        assert np.abs(found - wanted)[500:-500].max() < 2e-3


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"RIFF not a sound", "no sound that can be read"),
        (wav(np.zeros(0)), "empty"),
        (wav(np.zeros(4000))[:3000], "truncated|damaged"),
        ({"array": np.array([0.0, np.nan]), "sampling_rate": 16000}, "NaN"),
        ({"array": np.zeros(100)}, "without its sampling_rate"),
        ({"array": np.zeros(100), "sampling_rate": 10}, "a rate of 10 Hz"),
    ],
)
def test_bad_sound_is_refused(value, says):
    with pytest.raises(ValueError, match=says):
        read_sound(find_media(value, "audio", ""), 16000)


def test_another_rate_is_an_error_when_the_recipe_says_so():
    with pytest.raises(ValueError, match="8,000 Hz, the model wants 16,000 Hz"):
        read_sound(find_media(wav(np.zeros(800), 8000), "audio", ""), 16000, resample=False)


def test_only_the_first_seconds_are_read_where_there_is_a_limit():
    media = find_media(wav(np.arange(16000) / 32000), "audio", "")
    assert len(read_sound(media, 16000, max_seconds=0.25)) == 4000


def test_the_key_follows_the_content(root):
    one = find_media("good.png", "image", str(root))
    assert one.key == find_media("good.png", "image", str(root)).key
    (root / "good.png").write_bytes(png("L"))
    assert find_media("good.png", "image", str(root)).key != one.key
    assert find_media(b"a", "image", "").key != find_media(b"b", "image", "").key
