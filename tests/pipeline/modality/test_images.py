"""Images that cannot be used are refused with the reason; the others look as they were drawn."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.config.augmentation import ImageAugmentation
from pipeline.modality.image_augmentation import OPERATIONS, augment_images
from pipeline.modality.images import decode_image
from pipeline.modality.quarantine import BadSample

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def png(pixels=PIXELS, mode=None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 20,000 x 20,000 pixels."""
    data = bytearray(png())
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.roll(PIXELS, shift)) for shift in (0, 99, 200)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def sixteen_bits() -> bytes:
    return png(np.arange(768, dtype=np.uint16).reshape(24, 32) * 80)


def cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def test_pixels_come_out_as_they_went_in():
    for value in (png(), {"bytes": png(), "path": None}):
        assert np.array_equal(np.asarray(decode_image(value)), PIXELS)


def test_a_path_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    value = {"bytes": None, "path": str(tmp_path / "a.png")}
    assert np.array_equal(np.asarray(decode_image(value)), PIXELS)


def test_transparent_parts_are_white():
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    assert np.asarray(decode_image(png(pixels))).min() == 255


def test_a_camera_held_upright_gives_an_upright_picture():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(png(exif=exif)).size == (24, 32)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"not an image", "broken image"),
        (png()[:200], "broken image"),
        (b"", "broken image"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": None, "path": "/nowhere/a.png"}, "not readable"),
        (bomb(), "decompression bomb"),
        (animation(), "animated: 3 frames"),
        (sixteen_bits(), "colour mode I;16"),
        (cmyk(), "colour mode CMYK"),
    ],
    ids=["text", "cut", "empty", "nothing", "path", "bomb", "animation", "16 bits", "cmyk"],
)
def test_what_cannot_be_used_is_refused_with_the_reason(value, reason):
    with pytest.raises(BadSample, match=reason):
        decode_image(value)


# -- augmentation ----------------------------------------------------------------------------------

EVERYTHING = ImageAugmentation(
    random_resized_crop=0.3,
    shift_pixels=2,
    horizontal_flip=0.5,
    colour_jitter=0.4,
    rand_augment_operations=2,
)


def augmented(ids, settings=EVERYTHING, step=4, mode="RGB"):
    images = [Image.fromarray(np.roll(PIXELS, 3 * i)).convert(mode) for i in ids]
    found = augment_images(images, settings, 1, step, ids, (16, 16))
    return {i: np.asarray(image) for i, image in zip(ids, found, strict=True)}


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_sample_looks_the_same_in_any_batch(mode):
    whole = augmented([1, 2, 3, 4, 5, 6], mode=mode)
    for ids in ([6, 1], [3], [5, 2, 4]):
        for sample, pixels in augmented(ids, mode=mode).items():
            assert np.array_equal(pixels, whole[sample])


def test_every_step_shows_another_picture():
    first, second = augmented([1, 2, 3], step=0), augmented([1, 2, 3], step=1)
    assert all(not np.array_equal(first[i], second[i]) for i in first)


def test_nothing_asked_for_changes_nothing():
    image = Image.fromarray(PIXELS)
    assert augment_images([image], ImageAugmentation(), 1, 0, [1], (9, 9)) == [image]


def test_half_of_the_samples_are_mirrored_exactly():
    settings, ids = ImageAugmentation(horizontal_flip=0.5), list(range(400))
    images = [Image.fromarray(PIXELS)] * len(ids)
    found = augment_images(images, settings, 0, 0, ids, (16, 16))
    flipped = [np.array_equal(np.asarray(image), PIXELS[:, ::-1]) for image in found]
    kept = [np.array_equal(np.asarray(image), PIXELS) for image in found]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert abs(sum(flipped) - 200) < 3 * 10


def test_a_shift_moves_every_pixel_by_as_much():
    found = augmented([0], ImageAugmentation(shift_pixels=2))[0]
    padded = np.pad(PIXELS, [(2, 2), (2, 2), (0, 0)], mode="symmetric")
    moves = [(y, x) for y in range(5) for x in range(5)]
    windows = [padded[y : y + 24, x : x + 32] for y, x in moves]
    assert sum(np.array_equal(found, window) for window in windows) == 1


def test_crops_keep_at_least_the_area_asked_for():
    dot = np.zeros((100, 100), dtype=np.uint8)
    dot[::2, ::2] = 255
    settings = ImageAugmentation(random_resized_crop=0.5)
    found = augment_images([Image.fromarray(dot)] * 50, settings, 0, 0, list(range(50)), (40, 40))
    assert {image.size for image in found} == {(40, 40)}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("strength", [-0.9, 0.9])
def test_every_operation_takes_both_directions_and_modes(mode, strength):
    image = Image.fromarray(PIXELS).convert(mode)
    for operation in OPERATIONS:
        found = operation(image, strength)
        assert (found.size, found.mode) == (image.size, image.mode)
