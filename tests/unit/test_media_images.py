"""Images and masks keep what their files say, and nothing that a file holds gets past the checks."""

import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from lora_ft.media import find_media, image_size, read_image, read_mask

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
IDS = RNG.integers(0, 5, (12, 16), dtype=np.uint8)


def saved(image, form, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def grey_png(bits: int, values) -> bytes:
    """A PNG file of grey values of so many bits, which Pillow does not write."""
    height, width = values.shape
    lines = []
    for line in values:
        text = "".join(format(int(v), f"0{bits}b") for v in line)
        text += "0" * (-len(text) % 8)
        lines.append(b"\0" + int(text, 2).to_bytes(len(text) // 8, "big"))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = zlib.compress(b"".join(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def found(value):
    return find_media(value, "image", "")


@pytest.mark.parametrize("how", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_stands_as_its_exif_says_in_every_format_and_its_size_is_known_before(form, how):
    from PIL import ImageOps

    picture = Image.new("RGB", (32, 16), (255, 255, 255))
    picture.paste((255, 0, 0), (0, 0, 16, 8))  # the upper left quarter is red
    exif = Image.Exif()
    exif[0x0112] = how
    media = found(saved(picture, form, exif=exif, **({"lossless": True} if form == "WEBP" else {})))
    oracle = picture.copy()
    oracle.getexif()[0x0112] = how
    wanted = np.asarray(ImageOps.exif_transpose(oracle)).astype(int)
    image = read_image(media)
    assert image.size == image_size(media) == (wanted.shape[1], wanted.shape[0])
    assert np.abs(np.asarray(image).astype(int) - wanted).mean() < 8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_an_image_with_damaged_exif_is_read_as_it_stands():
    exif = Image.Exif()
    exif[0x0112] = 6
    for damaged in (b"Exif\0\0garbage and more", exif.tobytes()[:20]):
        media = found(saved(Image.fromarray(PIXELS), "JPEG", exif=damaged))
        assert read_image(media).size == image_size(media) == (16, 12)
    data = saved(Image.fromarray(PIXELS), "WEBP", exif=exif.tobytes())
    at = data.index(b"EXIF") + 8
    at = data.index(b"*", at) - 3
    media = found(data[:at] + b"xyz?" + data[at + 4 :])
    assert read_image(media).size == image_size(media) == (16, 12)


def test_cmyk_palette_and_animated_images_are_their_first_picture_in_colours():
    red, blue = (Image.new("RGB", (8, 6), c) for c in ("red", "blue"))
    assert read_image(found(saved(red.convert("CMYK"), "TIFF"))).getpixel((1, 1)) == (255, 0, 0)
    assert (
        np.abs(np.subtract(read_image(found(saved(red.convert("CMYK"), "JPEG"))).getpixel((1, 1)), (255, 0, 0))).max()
        < 4
    )
    assert read_image(found(saved(red.quantize(4), "PNG"))).getpixel((1, 1)) == (255, 0, 0)
    assert read_image(found(saved(red, "GIF", save_all=True, append_images=[blue]))).getpixel((1, 1)) == (255, 0, 0)
    clear = Image.new("P", (8, 6), 1)
    clear.putpalette([255, 0, 0, 0, 0, 255])
    assert read_image(found(saved(clear, "PNG", transparency=1))).getpixel((1, 1)) == (255, 255, 255)
    assert read_image(found(saved(clear, "PNG", transparency=0))).getpixel((1, 1)) == (0, 0, 255)
    grey = Image.new("L", (8, 6), 9)
    grey.info["transparency"] = 9
    for value in (grey, saved(grey, "PNG")):
        assert read_image(found(value)).getpixel((1, 1)) == (255, 255, 255)


def test_half_clear_pixels_are_mixed_with_white_whatever_form_they_come_in():
    layers = np.dstack([PIXELS, np.full((12, 16), 128, np.uint8)])
    wanted = PIXELS * (128 / 255) + 255 * (127 / 255)
    picture = Image.fromarray(layers)
    for value in (saved(picture, "PNG"), picture, layers, layers / 255.0, layers.transpose(2, 0, 1)):
        assert np.abs(np.asarray(read_image(found(value))) - wanted).max() <= 1


def test_floats_of_a_tiff_file_are_shares_of_255_or_bytes_and_nothing_is_stretched():
    for array in (PIXELS[..., 0] / np.float32(255), PIXELS[..., 0].astype(np.float32)):
        image = read_image(found(saved(Image.fromarray(array.astype(np.float32)), "TIFF")))
        assert np.array_equal(np.asarray(image)[..., 1], PIXELS[..., 0])
    with pytest.raises(ValueError, match="from -1 to 300; allowed: 0 to 255"):
        read_image(found(saved(Image.fromarray(np.float32([[-1, 300]])), "TIFF")))
    with pytest.raises(ValueError, match="allowed: 16 bits"):
        read_image(found(saved(Image.fromarray(np.int32([[0, 70000]])), "TIFF")))


def test_true_and_false_are_white_and_black():
    media = found(IDS > 2)
    assert np.array_equal(np.asarray(read_image(media))[..., 0], (IDS > 2) * np.uint8(255))
    assert np.array_equal(read_mask(media), IDS > 2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_classes_of_a_mask_in_few_bits_are_not_stretched(bits):
    ids = RNG.integers(0, 2**bits, (9, 13))
    assert np.array_equal(read_mask(found(grey_png(bits, ids))), ids)


def test_classes_of_masks_in_pgm_tiff_and_palettes_are_what_the_file_says():
    for top in (1, 20, 255, 3000):
        ids = RNG.integers(0, top + 1, (4, 6))
        body = ids.astype(">u2" if top > 255 else np.uint8).tobytes()
        assert np.array_equal(read_mask(found(f"P5 6 4 {top}\n".encode() + body)), ids)
    for array in (IDS, IDS.astype(np.uint16) + 300, IDS.astype(np.int32) + 70000):
        assert np.array_equal(read_mask(found(saved(Image.fromarray(array), "TIFF"))), array)
    palette = Image.fromarray(IDS).convert("P")
    palette.putpalette([i for n in range(5) for i in (255 - n, n, 7)])
    for value in (saved(palette, "PNG"), saved(palette, "GIF"), palette, Image.fromarray(IDS), IDS, IDS.astype(float)):
        assert np.array_equal(read_mask(found(value)), IDS)
    deep = IDS.astype(np.uint16) + 300
    assert np.array_equal(read_mask(found(Image.fromarray(deep))), deep)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (saved(Image.fromarray(IDS), "JPEG"), "JPEG changes the numbers .* save the mask as PNG"),
        (PIXELS, "2 dimensions, got 3"),
        (IDS / 255.0, "fractions or NaN"),
        (np.full((2, 2), np.nan), "fractions or NaN"),
        (saved(Image.fromarray(IDS), "PNG")[:70], "damaged or truncated"),
        (np.zeros((9000, 9000), np.bool_), "81,000,000 pixels, allowed 50,000,000"),
    ],
)
def test_what_is_no_mask_is_refused(value, says):
    with pytest.raises(ValueError, match=says):
        read_mask(found(value))


def giant_gif() -> bytes:
    """A small screen with a first picture of 60,000 x 60,000."""
    frame = struct.pack("<HHHHB", 0, 0, 60000, 60000, 0)
    return b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + b"\0" * 6 + b"," + frame + b"\x02\x02L\x01\0;"


def giant_tile() -> bytes:
    """A TIFF file of 8 x 8 pixels in one tile of 40,000 x 40,000."""
    tags = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (277, 1), (322, 40000), (323, 40000), (324, 8), (325, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def giant(form: str) -> bytes:
    """A file whose header says 60,000 x 60,000 pixels."""
    size = 60000
    if form == "JPEG":
        data = bytearray(saved(Image.fromarray(PIXELS), "JPEG"))
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", size, size)
        return bytes(data)
    if form == "BMP":
        data = bytearray(saved(Image.fromarray(PIXELS), "BMP"))
        data[18:26] = struct.pack("<ii", size, size)
        return bytes(data)
    if form == "PPM":
        return f"P6 {size} {size} 255\n".encode() + b"\0" * 100
    return {"GIF": giant_gif, "TIFF": giant_tile}[form]()


@pytest.mark.parametrize("form", ["JPEG", "BMP", "PPM", "GIF", "TIFF"])
def test_a_giant_header_is_refused_before_memory_is_taken(form, monkeypatch):
    data = giant(form)
    monkeypatch.setattr(Image.core, "new", lambda *_: pytest.fail("memory for pixels was taken"))
    with pytest.raises(ValueError, match=r"pixels|exceeds limit"):
        read_image(found(data))


def test_a_size_over_pillows_own_limit_is_the_callers_to_allow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow warns from here on, and refuses twice as much
    media = found(saved(Image.fromarray(PIXELS), "PNG"))
    assert np.array_equal(np.asarray(read_image(media)), PIXELS)
    assert image_size(media) == (16, 12)


def test_the_size_is_read_without_the_pixels():
    data = saved(Image.fromarray(PIXELS), "PNG")
    cut = data[: data.index(b"IDAT") + 12]
    assert image_size(found(cut)) == (16, 12)
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_image(found(cut))


def test_postscript_and_other_files_that_run_programs_are_no_images():
    for form in ("EPS", "ICO", "PDF"):
        with pytest.raises(ValueError, match=r"no image that can be read .* allowed: PNG, JPEG"):
            read_image(found(saved(Image.fromarray(PIXELS), form)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"])
def test_no_damage_gives_another_error_than_that_the_file_is_bad(form):
    rng, good, bad = np.random.default_rng(1), saved(Image.fromarray(PIXELS), form), 0
    for turn in range(60):
        data = bytearray(good[: rng.integers(1, len(good))] if turn % 4 == 0 else good)
        for at in rng.integers(0, min(len(data), 120 if turn % 2 else len(data)), 4):
            data[at] = rng.integers(0, 256)
        for read in (read_image, image_size, read_mask):
            try:
                read(found(bytes(data)))
            except ValueError:
                bad += 1
    assert bad


def test_threads_read_alike_and_leave_the_filters_of_warnings_and_pillows_switches_alone(tmp_path):
    for n in range(8):
        Image.fromarray(np.roll(PIXELS, n, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "0.png").read_bytes()[:99])
    before = (list(warnings.filters), warnings.showwarning, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    wrong, filters = [], []

    def work(first):
        for turn in range(40):
            n = (first + turn) % 8
            if not np.array_equal(
                np.asarray(read_image(find_media(f"{n}.png", "image", str(tmp_path)))), np.roll(PIXELS, n, 0)
            ):
                wrong.append(n)
            with pytest.raises(ValueError, match="damaged or truncated"):
                read_image(find_media("bad.png", "image", str(tmp_path)))
            filters.append(warnings.filters == before[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(filters) == 160
    assert all(filters)
    now = (list(warnings.filters), warnings.showwarning, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert before == now


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b.png", "loop.png", "~nobody/x.png"])
def test_paths_that_no_file_can_have_are_bad_rows_and_no_crash(tmp_path, name):
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError, match=r"no image can be at such a path|no such file") as caught:
        find_media(name, "image", str(tmp_path))
    assert len(str(caught.value)) < 600


def test_a_root_that_is_itself_a_link_holds_its_files_and_nothing_beside_them(tmp_path):
    real = tmp_path / "real"
    (real / "in").mkdir(parents=True)
    Image.fromarray(PIXELS).save(real / "in" / "x.png")
    Image.fromarray(PIXELS).save(tmp_path / "out.png")
    (tmp_path / "root").symlink_to(real)
    (real / "inner.png").symlink_to("in/x.png")
    (real / "up").symlink_to("..")
    for name in ("in/x.png", "in/../in/x.png", "inner.png", str(real / "in" / "x.png"), real / "in" / "x.png"):
        assert read_image(find_media(name, "image", str(tmp_path / "root"))).size == (16, 12)
    for name in ("../out.png", "up/out.png", "in/../../out.png", str(tmp_path / "out.png"), "../real-too/x.png"):
        with pytest.raises(ValueError, match="outside of the data's folder"):
            find_media(name, "image", str(tmp_path / "root"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_a_bad_row(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(saved(Image.fromarray(PIXELS), "PNG"))
    path.chmod(0)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        read_image(find_media("x.png", "image", str(tmp_path)))


def test_a_file_that_vanishes_between_finding_and_reading_is_a_bad_row(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(saved(Image.fromarray(PIXELS), "PNG"))
    media = find_media("x.png", "image", str(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_image(media)
