"""Augmentation is a function of the input, the options and one generator, and moves masks and boxes with the pixels."""

import colorsys
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lora_ft.media import ImageAugment, SoundAugment
from lora_ft.media.image_augment import FILL, RATIO, VOID, augment_image, augment_with, blend
from lora_ft.media.sound_augment import augment_sound, mask_features

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
WAVE = np.sin(np.arange(4000) / 9).astype(np.float32) * np.float32(0.3)
ALL = ImageAugment(
    crop=(0.4, 1), pad_crop=3, flip=0.5, vertical_flip=0.5, rotate=30, brightness=0.4, contrast=0.4, saturation=0.4,
    hue=0.2, erase=0.5,
)  # fmt: skip
LOUD = SoundAugment(noise=0.9, gain_db=(-6, 6), shift=0.3, time_mask=(2, 0.2), frequency_mask=(2, 5))


def rng(seed=0):
    return np.random.default_rng(seed)


def at(options, seed=0, picture=PICTURE):
    return np.asarray(augment_image(picture, options, rng(seed))).astype(np.float64)


def test_the_same_seed_gives_the_same_bits_in_any_thread_and_another_seed_other_ones():
    def made(seed):
        view = augment_with(PICTURE, ALL, rng(seed), mask=PIXELS[..., 0], boxes=[(2, 3, 20, 18)])
        sound = augment_sound(WAVE, LOUD, rng(seed))
        masked = mask_features(WAVE.reshape(100, 40), LOUD, rng(seed))
        return view.image.tobytes(), view.mask.tobytes(), view.boxes.tobytes(), sound.tobytes(), masked.tobytes()

    alone = [made(seed) for seed in range(12)]
    assert len({row[0] for row in alone}) == len({row[3] for row in alone}) == 12
    before, found = (np.random.get_state()[1].tobytes(), torch.get_rng_state()), {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({(i, s): made(s) for s in range(11, -1, -1)}))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(i, seed): alone[seed] for i in range(3) for seed in range(12)}
    assert before[0] == np.random.get_state()[1].tobytes()
    assert torch.equal(before[1], torch.get_rng_state())


def test_nothing_is_changed_where_nothing_is_asked_for_and_the_input_never_is():
    assert not ImageAugment().on
    assert not SoundAugment().on
    assert ALL.on
    assert np.array_equal(at(ImageAugment()), PIXELS)
    assert np.array_equal(augment_sound(WAVE, SoundAugment(), rng()), WAVE)
    assert np.array_equal(mask_features(WAVE.reshape(100, 40), SoundAugment(), rng()), WAVE.reshape(100, 40))
    picture, sound, features = PICTURE.copy(), WAVE.copy(), WAVE.reshape(100, 40).copy()
    for seed in range(8):
        augment_image(picture, ALL, rng(seed))
        augment_sound(sound, LOUD, rng(seed))
        mask_features(features, LOUD, rng(seed))
    assert np.array_equal(np.asarray(picture), PIXELS)
    assert np.array_equal(sound, WAVE)
    assert np.array_equal(features.ravel(), WAVE)


@pytest.mark.parametrize(
    "options",
    [
        {"crop": [0.9, 0.5]}, {"crop": [0, 1]}, {"crop": [0.5, 1.5]}, {"flip": 1.5}, {"hue": 0.6}, {"rotate": 200},
        {"pad_crop": -1}, {"mixup": -1}, {"colour": 1},
    ],
)  # fmt: skip
def test_options_of_images_that_mean_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        ImageAugment(**options)


@pytest.mark.parametrize(
    "options", [{"gain_db": [6, -6]}, {"noise": 2}, {"noise_snr_db": [9, 1]}, {"shift": 2}, {"speed": 1}]
)
def test_options_of_sounds_that_mean_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        SoundAugment(**options)


def test_a_flip_is_certain_at_one_and_as_frequent_as_it_says():
    assert np.array_equal(at(ImageAugment(flip=1)), PIXELS[:, ::-1])
    assert np.array_equal(at(ImageAugment(vertical_flip=1)), PIXELS[::-1])
    done = sum(not np.array_equal(at(ImageAugment(flip=0.3), seed), PIXELS) for seed in range(1000))
    assert abs(done - 300) < 5 * math.sqrt(1000 * 0.3 * 0.7)


def test_a_crop_is_a_part_of_the_picture_with_the_area_and_ratio_that_are_allowed():
    grid = np.stack([*np.meshgrid(np.arange(200), np.arange(200)), np.zeros((200, 200))], -1).astype(np.uint8)
    areas = []
    for seed in range(200):
        part = at(ImageAugment(crop=(0.3, 0.6)), seed, Image.fromarray(grid))
        height, width = part.shape[:2]
        left, top = part[0, 0, :2].astype(int)
        assert np.array_equal(part, grid[top : top + height, left : left + width])
        assert RATIO[0] * 0.98 <= width / height <= RATIO[1] * 1.02
        areas.append(width * height / 200**2)
    assert 0.29 < min(areas) < 0.33
    assert 0.57 < max(areas) < 0.61


def test_a_long_picture_is_cut_to_a_ratio_that_is_allowed_and_not_squeezed():
    for size, wanted in (((1000, 12), (16, 12)), ((12, 1000), (12, 16)), ((1, 50), (1, 1))):
        assert augment_image(Image.new("RGB", size), ImageAugment(crop=(0.9, 1)), rng()).size == wanted


def test_pad_and_crop_keeps_the_size_and_shows_the_picture_moved():
    seen = set()
    for seed in range(300):
        found = at(ImageAugment(pad_crop=2), seed)
        assert found.shape == PIXELS.shape
        padded = np.empty((28, 36, 3))
        padded[:] = FILL
        padded[2:-2, 2:-2] = PIXELS
        places = [(y, x) for y in range(5) for x in range(5) if np.array_equal(found, padded[y : y + 24, x : x + 32])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 25


def test_brightness_contrast_saturation_and_hue_are_the_formulas_of_colour():
    grey = PIXELS @ np.array([0.299, 0.587, 0.114])
    blacks = {"brightness": np.zeros_like(grey), "contrast": np.full_like(grey, round(grey.mean())), "saturation": grey}
    for name, ground in blacks.items():
        for seed in range(5):
            draws = rng(seed)
            draws.random(2)  # of the flips, which come first
            factor = draws.uniform(0.6, 1.4)
            wanted = (PIXELS * factor + ground[..., None] * (1 - factor)).clip(0, 255)
            assert np.abs(at(ImageAugment(**{name: 0.4}), seed) - wanted).max() < 2.1, name
    pure = Image.new("RGB", (4, 4), (255, 0, 0))
    for seed in range(5):
        draws = rng(seed)
        draws.random(2)
        shift = round(256 * draws.uniform(-0.5, 0.5)) / 256
        wanted = 255 * np.array(colorsys.hsv_to_rgb(shift % 1, 1, 1))
        assert np.abs(at(ImageAugment(hue=0.5), seed, pure)[0, 0] - wanted).max() < 4


def test_an_erased_box_has_the_area_that_is_allowed_and_the_rest_stays():
    areas = []
    for seed in range(100):
        changed = (at(ImageAugment(erase=1), seed) != PIXELS).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.9
        areas.append(changed.mean())
    assert min(areas) < 0.06
    assert 0.25 < max(areas) < 0.36


@pytest.mark.parametrize("seed", range(30))
def test_masks_and_boxes_go_where_the_pixels_go(seed):
    options = ImageAugment(crop=(0.5, 1), pad_crop=6, flip=0.5, vertical_flip=0.5, rotate=20)
    width, height, boxes = 96, 80, [(10, 12, 40, 30), (50, 40, 90, 76)]
    ids, pixels = np.zeros((height, width), int), np.zeros((height, width, 3), np.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        ids[top:bottom, left:right] = 300 * number
        pixels[top:bottom, left:right, number - 1] = 255
    view = augment_with(Image.fromarray(pixels), options, rng(seed), mask=ids, boxes=boxes)
    shown = np.asarray(view.image)
    assert view.mask.shape == shown.shape[:2]
    assert set(np.unique(view.mask)) <= {0, 300, 600, VOID}
    for number in (1, 2):
        here, there = view.mask == 300 * number, (shown[..., number - 1] > 200) & (shown[..., 2] < 50)
        assert (here != there).mean() < 0.02
        if number - 1 in view.kept:
            box = view.boxes[view.kept.index(number - 1)]
            rows, columns = np.flatnonzero(here.any(1)), np.flatnonzero(here.any(0))
            around = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (box[:2] <= around[:2] + 1.5).all()
            assert (box[2:] >= around[2:] - 1.5).all()
            assert (box >= 0).all()
            assert (box <= np.tile(view.image.size, 2)).all()
        else:
            assert here.sum() <= 0.15 * (ids == 300 * number).sum()


def test_a_turn_by_a_right_angle_takes_a_box_to_where_the_pixels_are():
    from lora_ft.media.image_augment import _turned

    picture = np.zeros((60, 60, 3), np.uint8)
    picture[5:15, 20:50] = 255
    for angle in (90.0, 180.0, 270.0):
        rows, columns = np.nonzero(np.asarray(Image.fromarray(picture).rotate(angle))[..., 0])
        wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.allclose(_turned(np.array([[20.0, 5, 50, 15]]), angle, (60, 60))[0], wanted)


def test_a_box_of_which_less_than_a_tenth_is_left_is_dropped_and_the_others_are_cut():
    wide = Image.new("RGB", (100, 100))
    boxes = [(0, 0, 100, 100), (-95, 0, 5, 10), (-50, 0, 50, 10), (200, 200, 300, 300), (10, 10, 10, 20)]
    view = augment_with(wide, ImageAugment(), rng(), boxes=boxes)
    assert view.kept == [0, 2]
    assert view.boxes.tolist() == [[0, 0, 100, 100], [0, 0, 50, 10]]


def test_mixup_is_the_formula_in_float64_and_its_share_is_drawn_from_beta():
    x, y = torch.rand(2, 3, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = []
    for seed in range(500):
        mixed, share = blend(x, y, rng(seed), ImageAugment(mixup=0.4))
        assert torch.allclose(mixed, share * x + (1 - share) * y, atol=1e-15)
        shares.append(share)
    variance = 1 / (4 * (2 * 0.4 + 1))  # of Beta(a, a)
    assert abs(np.mean(shares) - 0.5) < 5 * math.sqrt(variance / 500)
    assert abs(np.var(shares) - variance) < 0.02


def test_cutmix_pastes_one_box_and_the_share_is_what_is_left_to_the_pixel():
    x, y = torch.zeros(3, 40, 30), torch.ones(3, 40, 30)
    shares = []
    for seed in range(500):
        mixed, share = blend(x, y, rng(seed), ImageAugment(cutmix=1.0))
        assert share == pytest.approx(1 - mixed.double().mean().item(), abs=1e-12)
        rows, columns = mixed[0].any(1).nonzero().ravel(), mixed[0].any(0).nonzero().ravel()
        if len(rows):
            assert mixed[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].min() == 1
        shares.append(share)
    assert not x.any()
    assert min(shares) < 0.2
    assert max(shares) > 0.95


def test_with_mixup_and_cutmix_each_is_drawn_half_of_the_time():
    x, y = torch.zeros(1, 16, 16), torch.ones(1, 16, 16)
    options = ImageAugment(mixup=1, cutmix=1)
    pasted = sum(set(blend(x, y, rng(seed), options)[0].unique().tolist()) <= {0.0, 1.0} for seed in range(400))
    assert abs(pasted - 200) < 50


def test_noise_has_the_ratio_to_the_signal_that_was_drawn():
    for level in (0.0, 10.0, 30.0):
        found = augment_sound(WAVE, SoundAugment(noise=1, noise_snr_db=(level, level)), rng()).astype(np.float64)
        ratio = np.mean(WAVE.astype(np.float64) ** 2) / np.mean((found - WAVE) ** 2)
        assert 10 * math.log10(ratio) == pytest.approx(level, abs=0.3)
    assert not augment_sound(np.zeros(100), SoundAugment(noise=1), rng()).any()
    done = sum(not np.array_equal(augment_sound(WAVE, SoundAugment(noise=0.3), rng(s)), WAVE) for s in range(500))
    assert abs(done - 150) < 5 * math.sqrt(500 * 0.3 * 0.7)


def test_a_gain_is_in_decibels_and_a_shift_fills_with_silence():
    gains = []
    for seed in range(200):
        found = augment_sound(WAVE, SoundAugment(gain_db=(-6, 3)), rng(seed)).astype(np.float64)
        factor = found[100:].dot(WAVE[100:]) / WAVE[100:].astype(np.float64).dot(WAVE[100:])
        assert np.allclose(found, factor * WAVE, atol=1e-6)
        gains.append(20 * math.log10(factor))
    assert -6.001 <= min(gains) < -5.5
    assert 2.5 < max(gains) <= 3.001
    places, ramp = set(), np.arange(1, 101, dtype=np.float32)
    for seed in range(300):
        found = augment_sound(ramp, SoundAugment(shift=0.2), rng(seed))
        by = int(np.flatnonzero(found)[0]) if found[0] == 0 else 1 - int(found[0])
        wanted = np.zeros(100)
        wanted[max(0, by) : 100 + min(0, by)] = ramp[max(0, -by) : 100 - max(0, by)]
        assert np.array_equal(found, wanted)
        places.add(by)
    assert min(places) == -20
    assert max(places) == 20


def test_spectrum_masks_are_stretches_and_bands_of_the_mean_no_wider_than_allowed():
    features = np.random.default_rng(1).standard_normal((60, 20)).astype(np.float32)
    widest_time = widest_band = 0
    ends = set()
    for seed in range(300):
        changed = mask_features(features, SoundAugment(time_mask=(1, 0.25)), rng(seed)) != features
        rows = np.flatnonzero(changed.any(1))
        assert changed[rows].all()
        assert not len(rows) or rows[-1] - rows[0] + 1 == len(rows)
        widest_time = max(widest_time, len(rows))
        ends.update({0, 59} & set(rows.tolist()))
        found = mask_features(features, SoundAugment(frequency_mask=(1, 6)), rng(seed))
        columns = np.flatnonzero((found != features).any(0))
        assert (found[:, columns] == features.mean()).all()
        widest_band = max(widest_band, len(columns))
    assert (widest_time, widest_band) == (15, 6)
    assert ends == {0, 59}
    both = SoundAugment(time_mask=(3, 0.1), frequency_mask=(3, 50))
    assert mask_features(features, both, rng()).shape == features.shape
    assert mask_features(features[:1], both, rng()).shape == (1, 20)
