"""Sounds are the same from a file, from bytes and from an array, and what was cut off is never read as whole."""

import io
import struct
import threading

import numpy as np
import pytest
import soundfile

from lora_ft.media import find_media, read_sound, sound_info

RATE = 16000
WAVE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / RATE)


def saved(wave, form="WAV", subtype=None, rate=RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, subtype=subtype, format=form)
    return file.getvalue()


def found(value, rate=0):
    return find_media({"array": value, "sampling_rate": rate} if rate else value, "audio", "")


FORMS = [
    ("WAV", "PCM_16", 2**-15), ("WAV", "PCM_24", 2**-23), ("WAV", "FLOAT", 1e-7), ("WAV", "DOUBLE", 1e-7),
    ("WAV", "PCM_U8", 2**-6), ("FLAC", "PCM_24", 2**-23), ("OGG", "VORBIS", 0.05), ("OGG", "OPUS", 0.05),
    ("MP3", None, 0.05), ("AIFF", "PCM_16", 2**-15), ("AU", "PCM_16", 2**-15), ("CAF", "PCM_16", 2**-15),
]  # fmt: skip


@pytest.mark.parametrize(("form", "subtype", "close"), FORMS)
def test_every_kind_of_file_is_the_sound_that_was_written_from_disk_and_from_memory(tmp_path, form, subtype, close):
    data = saved(WAVE, form, subtype)
    (tmp_path / "x.raw").write_bytes(data)  # what a file is, is not in its name
    for media in (found(data), find_media("x.raw", "audio", str(tmp_path))):
        assert sound_info(media) == (3.0, RATE)
        sound = read_sound(media, RATE)
        assert (sound.dtype, sound.shape) == (np.float32, WAVE.shape)
        assert np.abs(sound - WAVE)[2000:-2000].max() <= close
        assert np.array_equal(read_sound(media, RATE, max_seconds=0.5), sound[: RATE // 2])


@pytest.mark.parametrize(
    ("own", "rate", "hertz"), [(8000, 16000, 1000), (44100, 16000, 3000), (48000, 16000, 5000), (16000, 22050, 2000)]
)
def test_resampling_keeps_a_tone_and_removes_what_the_new_rate_cannot_hold(own, rate, hertz):
    def tone(at, frequency):
        return 0.5 * np.sin(2 * np.pi * frequency * np.arange(at) / at)

    sound = read_sound(found(tone(own, hertz), own), rate).astype(np.float64)
    assert len(sound) == rate
    assert np.abs(sound - tone(rate, hertz))[1000:-1000].max() < 1e-3
    if own > rate:
        above = read_sound(found(tone(own, 0.45 * own), own), rate)  # would come back as an alias
        assert np.abs(above)[1000:-1000].max() < 1e-3


def test_channels_are_averaged_whichever_way_an_array_or_a_file_has_them():
    left, right = WAVE, np.roll(WAVE, 7) / 3
    both = np.stack([left, right])
    for value in (found(both, RATE), found(both.T, RATE), found(saved(both.T, "WAV", "FLOAT"))):
        assert np.abs(read_sound(value, RATE) - (left + right) / 2).max() < 1e-6
    many = np.tile(WAVE, (16, 1))
    for value in (found(many, RATE), found(many.T, RATE)):
        assert np.abs(read_sound(value, RATE) - WAVE).max() < 1e-6


@pytest.mark.parametrize(
    ("array", "close"),
    [
        (np.round(WAVE * 2**15).astype(np.int16), 2**-15), (np.round(WAVE * 2**31).astype(np.int32), 2**-23),
        (np.round(WAVE * 2**7 + 2**7).astype(np.uint8), 2**-7), (WAVE.astype(np.float16), 2**-10),
    ],
    ids=["int16", "int32", "uint8", "float16"],
)  # fmt: skip
def test_arrays_of_integers_are_scaled_as_pcm_files_are(array, close):
    assert np.abs(read_sound(found(array, RATE), RATE) - WAVE).max() <= close
    if array.dtype == np.int16:
        assert np.array_equal(read_sound(found(array, RATE), RATE), read_sound(found(saved(array)), RATE))


def test_a_list_of_ones_is_taken_as_it_is():
    assert read_sound(found([1, -1, 0, 1], RATE), RATE).tolist() == [1, -1, 0, 1]


def test_what_is_a_little_too_loud_is_clipped_and_what_has_another_scale_is_refused():
    assert read_sound(found(np.array([1.5, -2.0, 0.25]), RATE), RATE).tolist() == [1, -1, 0.25]
    with pytest.raises(ValueError, match=r"numbers up to 16384; allowed: floats in \[-1, 1\]; divide them"):
        read_sound(found(WAVE * 2**15, RATE), RATE)
    with pytest.raises(ValueError, match=r"int64 has no known loudest value; allowed: .* int16"):
        read_sound(found([0, 3000, -5000], RATE), RATE)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "AIFF", "AU", "CAF", "OPUS"])
def test_a_file_that_was_cut_off_is_refused_and_not_read_as_a_shorter_sound(tmp_path, form, share):
    data = saved(WAVE, *(("OGG", "OPUS") if form == "OPUS" else (form,)))
    data = data[: int(len(data) * share)]
    (tmp_path / "x").write_bytes(data)
    for media in (found(data), find_media("x", "audio", str(tmp_path))):
        with pytest.raises(ValueError, match=r"truncated|damaged|no sound that can be read"):
            read_sound(media, RATE)


def test_a_sound_that_ends_before_its_header_says_is_refused():
    data = bytearray(saved(WAVE, "OGG", "OPUS"))
    middle = len(data) // 2
    data[middle : middle + 50] = b"\xff" * 50
    with pytest.raises(ValueError, match=r"a truncated sound: .* of 48,000 frames"):
        read_sound(found(bytes(data)), RATE)


def test_a_whole_file_with_a_tag_behind_it_or_of_a_pipe_is_no_file_that_was_cut_off():
    ogg = saved(WAVE, "OGG")
    assert len(read_sound(found(ogg + b"TAG" + b"\0" * 125), RATE)) == len(WAVE)
    wav = saved(WAVE)
    for size in (0xFFFFFFFF, 0x7FFFF000):  # ffmpeg and sox, which cannot go back to write it
        piped = wav[:4] + struct.pack("<I", size) + wav[8:40] + struct.pack("<I", size) + wav[44:]
        assert len(read_sound(found(piped), RATE)) == len(WAVE)
    odd = saved(WAVE[:1001], "WAV", "PCM_U8")
    unpadded = odd[:4] + struct.pack("<I", len(odd) - 8 + 1) + odd[8:]
    assert len(read_sound(found(unpadded), RATE)) == 1001


def test_a_flac_file_of_a_pipe_that_has_no_length_is_named():
    data = bytearray(saved(WAVE, "FLAC"))
    data[21] &= 0xF0
    data[22:26] = b"\0\0\0\0"
    for read in (sound_info, lambda m: read_sound(m, RATE)):
        with pytest.raises(ValueError, match="does not say how long the sound is"):
            read(found(bytes(data)))


@pytest.mark.parametrize(
    ("media", "says"),
    [
        (lambda: found(saved(np.zeros(0), "AIFF")), r"empty \(0 frames\)"),
        (lambda: found(saved(np.float32([0.1, np.nan, 0]), "WAV", "FLOAT")), "NaN or infinity"),
        (lambda: found(saved(np.array([1e300, 0.0]), "WAV", "DOUBLE")), "NaN or infinity"),
        (lambda: found(np.array([1e300, 0.0]), RATE), "NaN or infinity"),
        (lambda: found(np.array([[np.inf, 0, 0], [-np.inf, 0, 0]]), RATE), "NaN or infinity"),
        (lambda: found(np.array([0.5]), 48000), "empty at 16,000 Hz"),
        (lambda: found(np.zeros((2, 3, 4)), RATE), r"\(frames, channels\), got \(2, 3, 4\)"),
        (lambda: found(np.zeros((100, 100)), RATE), r"got \(100, 100\)"),
        (lambda: found(np.zeros(10), "fast"), "must be a number of Hz, got 'fast'"),
        (lambda: found(["a", "b"], RATE), "must hold numbers"),
        (lambda: found(b"this is a text, not a sound"), "no sound that can be read .* allowed: WAV, FLAC"),
        (lambda: found(saved(WAVE[:99], rate=500)), "a rate of 500 Hz, allowed 1,000 to 768,000"),
    ],
)
def test_bad_sounds_are_refused_with_what_is_wrong(media, says):
    with pytest.raises(ValueError, match=says):
        read_sound(media(), RATE)


def test_an_hour_is_the_most_and_a_limit_reads_the_start_of_a_longer_one():
    long = found(np.zeros(1000 * 3601, dtype=np.int8), 1000)
    for limit in (None, 4000):
        with pytest.raises(ValueError, match="3601 s of sound, allowed 3600 s; cut it"):
            read_sound(long, 1000, limit)
    assert len(read_sound(long, 1000, 2)) == 2000


def test_no_damage_gives_another_error_than_that_the_file_is_bad():
    rng, bad = np.random.default_rng(0), 0
    for form in ("WAV", "FLAC", "OGG", "AIFF"):
        good = saved(WAVE[:4000], form)
        for turn in range(40):
            data = bytearray(good)
            for at in rng.integers(0, min(len(data), 100 if turn % 2 else len(data)), 3):
                data[at] = rng.integers(0, 256)
            try:
                read_sound(found(bytes(data)), RATE, max_seconds=1)
            except ValueError:
                bad += 1
    assert bad > 20


def test_threads_read_alike(tmp_path):
    for n in range(4):
        soundfile.write(tmp_path / f"{n}.wav", WAVE * (n + 1) / 4, 8000)
    alone = [read_sound(find_media(f"{n}.wav", "audio", str(tmp_path)), RATE) for n in range(4)]
    wrong, done = [], []

    def work(first):
        for turn in range(8):
            n = (first + turn) % 4
            sound = read_sound(find_media(f"{n}.wav", "audio", str(tmp_path)), RATE)
            (done if np.array_equal(sound, alone[n]) else wrong).append(n)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), wrong) == (32, [])
