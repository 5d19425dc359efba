"""Which steps a transform has, and the fast path against timm's: same draws, crops, flips, operations and boxes."""

import random
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data.images import EncodedImage, decode_rgb
from data.transforms import DeviceTransform, FastTransform, build_transform
from util.config import AugmentConfig, ModelConfig
from util.distributed import seed_everything
from util.errors import InputError
from util.precision import Precision

CPU = Precision(torch.device("cpu"))
PHOTOGRAPHS = load_sample_images().images
NORMALIZE = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
PLAIN = {"aa": "none", "color_jitter": 0.0, "reprob": 0.0}


def photograph(width: int, height: int, which: int = 0) -> Image.Image:
    return ImageOps.fit(Image.fromarray(PHOTOGRAPHS[which]), (width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **kwargs) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def build(train: bool, *size: int, native_size: bool = False, flip: bool = True, **augment) -> transforms.Compose:
    config = ModelConfig("", input_size=size)
    return build_transform(train, config, AugmentConfig(**augment), native_size=native_size, flip=flip)


def levels(image: Tensor) -> np.ndarray:
    """Return the levels, int [H, W, 3], of an image that is uint8 or normalized [3, H, W]."""
    if image.dtype != torch.uint8:
        mean = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
        std = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
        image = ((image * std + mean) * 255).round()
    return image.permute(1, 2, 0).int().numpy()


def draw_both(reference: transforms.Compose, image: bytes | np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what the fast path and timm's make of an image with the same draws, as many from every stream."""
    encoded = isinstance(image, bytes)
    fast = partial(FastTransform(reference), EncodedImage(image, "x") if encoded else image)
    timm = partial(reference, decode_rgb(image, "x") if encoded else Image.fromarray(image))
    made = []
    after = []
    for run in (fast, timm):
        seed_everything(seed)
        made.append(run())
        after.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
    assert after[0] == after[1]
    assert made[0].dtype == torch.uint8 and made[0].shape == made[1].shape
    return levels(made[0]), levels(made[1])


# steps

RESIZED = "RandomResizedCropAndInterpolation"
FLIP = "RandomHorizontalFlip"
END = ["MaybeToTensor", "Normalize"]
ERASED = [*END, "RandomErasing"]
JITTERED = [FLIP, "AutoAugment", "ColorJitter", *END]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [RESIZED, FLIP, "RandAugment", *ERASED]),
        ({"aa": "None"}, [RESIZED, FLIP, "ColorJitter", *ERASED]),
        ({"aa": "augmix-m5-w4-d2"}, [RESIZED, FLIP, "AugMixAugment", *ERASED]),
        ({"aa": "", "color_jitter": 0.0, "reprob": 0.0}, [RESIZED, FLIP, *END]),
        ({"native_size": True, "flip": False}, ["RandomCrop", "RandAugment", *ERASED]),
        ({"native_size": True, "crop": "rrc"}, [RESIZED, FLIP, "RandAugment", *ERASED]),
        ({"native_size": True, "scale": (0.8, 1)}, [RESIZED, FLIP, "RandAugment", *ERASED]),
        ({"native_size": True, "ratio": (1, 1)}, [RESIZED, FLIP, "RandAugment", *ERASED]),
        ({"native_size": True, "crop": "pad", "hflip": 0.0}, ["RandomCrop", "RandAugment", *ERASED]),
        ({"crop": "pad"}, ["Resize", "RandomCrop", FLIP, "RandAugment", *ERASED]),
        ({"crop": "squash", "flip": False, "vflip": 0.5}, ["Resize", "RandomVerticalFlip", "RandAugment", *ERASED]),
        ({"flip": False, "hflip": 0.3}, [RESIZED, FLIP, "RandAugment", *ERASED]),
        (
            {"three_augment": True, "crop": "pad", "color_jitter": 0.0},
            ["Resize", "RandomCrop", FLIP, "AutoAugment", *END],
        ),
        ({"three_augment": True, "color_jitter": 0.0}, [RESIZED, FLIP, "AutoAugment", *END]),
        ({"three_augment": True, "native_size": True, "src": True}, ["Resize", "RandomCrop", *JITTERED]),
    ],
    ids=str,
)
def test_training_images_go_through_these_steps(kwargs, expected):
    assert [type(step).__name__ for step in build(True, 32, 32, **kwargs).transforms] == expected


def test_bounds_of_the_crop_and_probabilities_of_flips_are_what_was_given():
    bounds = {"scale": (0.5, 0.9), "ratio": (0.8, 1.1)}
    crop, mirror, turn, *_ = build(True, 32, 32, **bounds, hflip=0.3, vflip=0.2).transforms
    assert (tuple(crop.scale), tuple(crop.ratio), mirror.p, turn.p) == (*bounds.values(), 0.3, 0.2)
    crop, mirror, *_ = build(True, 32, 32).transforms
    assert (tuple(crop.scale), tuple(crop.ratio), mirror.p) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)


def test_interpolation_statistics_and_erasing_are_what_was_given():
    config = ModelConfig("", input_size=(32, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    augment = AugmentConfig(interpolation="lanczos", reprob=0.6, remode="rand", recount=3)
    crop, *_, normalize, erase = build_transform(True, config, augment).transforms
    assert (crop.size, crop.interpolation) == ((32, 24), InterpolationMode.LANCZOS)
    assert normalize.mean.tolist() == pytest.approx(config.mean)
    assert normalize.std.tolist() == pytest.approx(config.std)
    assert (erase.probability, erase.mode, erase.max_count) == (0.6, "rand", 3)


@pytest.mark.parametrize(("hflip", "vflip"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_squashed_images_are_resized_to_height_and_width_and_flipped(hflip, vflip):
    image = photograph(90, 50)
    expected = np.asarray(image.resize((24, 32), Image.Resampling.BICUBIC))
    config = ModelConfig("", input_size=(32, 24), crop_ratio=1.0, crop_mode="squash")
    assert (levels(build_transform(False, config)(image)) == expected).all()
    expected = expected[:: -1 if vflip else 1, :: -1 if hflip else 1]
    augment = AugmentConfig(crop="squash", hflip=hflip, vflip=vflip, **PLAIN)
    reference = build_transform(True, config, augment)
    assert (levels(reference(image)) == expected).all()
    assert (levels(FastTransform(reference)(np.array(image))) == expected).all()


def test_padded_images_are_windows_of_the_resized_image_in_a_black_border():
    image = photograph(90, 60)
    padded = np.pad(np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)), ((4, 4), (4, 4), (0, 0)))
    windows = {padded[i : i + 32, j : j + 32].tobytes(): (i, j) for i in range(9) for j in range(25)}
    reference = build(True, 32, 32, crop="pad", hflip=0.0, **PLAIN)
    places = [windows[levels(reference(image)).astype(np.uint8).tobytes()] for _ in range(200)]
    assert {i for i, _ in places} == set(range(9)) and len({j for _, j in places}) > 20


@pytest.mark.parametrize("native_size", [False, True])
@pytest.mark.parametrize("crop", ["pad", "squash"])
@pytest.mark.parametrize("aa", ["none", "rand-m9-mstd0.5-inc1"])
def test_whole_images_are_augmented_exactly_as_by_timm(aa, crop, native_size):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    size = pixels.shape[:2] if native_size else (32, 28)
    reference = build(True, *size, native_size=native_size, crop=crop, vflip=0.5, **PLAIN | {"aa": aa})
    for seed in range(30):
        np.testing.assert_array_equal(*draw_both(reference, pixels, seed))


def test_images_of_src_are_shifted_over_their_mirror_image():
    resize, crop, _, _, jitter, *_ = build(True, 48, 48, three_augment=True, src=True, color_jitter=0.3).transforms
    assert (resize.size, resize.interpolation) == (48, InterpolationMode.BICUBIC)
    assert (crop.size, crop.padding, crop.padding_mode) == ((48, 48), 4, "reflect")
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3) and jitter.hue is None
    for shape in ((90, 60), (60, 90), (20, 20)):
        assert build(True, 32, 64, three_augment=True, src=True)(Image.new("RGB", shape)).shape == (3, 32, 64)


def test_three_augment_is_grey_solarised_or_blurred():
    [step] = [s for s in build(True, 32, 32, three_augment=True).transforms if type(s).__name__ == "AutoAugment"]
    image = photograph(32, 32)
    grey = image.convert("L").convert("RGB").tobytes()
    solarised = ImageOps.solarize(image, 128).tobytes()
    counts = Counter()
    for seed in range(90):
        random.seed(seed)
        found = step(image)
        if found.tobytes() in (grey, solarised):
            counts[found.tobytes()] += 1
        else:
            counts["blurred"] += 1
            roughness = [np.abs(np.diff(np.asarray(i, int), axis=0)).sum() for i in (found, image)]
            assert roughness[0] <= roughness[1]
    assert set(counts) == {grey, solarised, "blurred"} and min(counts.values()) > 15


@pytest.mark.parametrize(("side", "ratio", "resized"), [(32, 0.875, 36), (50, 0.9, 55), (40, 1.0, 40)])
def test_evaluation_resizes_bicubically_and_crops_the_center(side, ratio, resized):
    data = encode(photograph(130, 90))
    reference = build_transform(False, ModelConfig("", input_size=(side, side), crop_ratio=ratio))
    image = transforms.Resize(resized, InterpolationMode.BICUBIC)(decode_rgb(data, "x"))
    expected = NORMALIZE(transforms.ToTensor()(transforms.CenterCrop(side)(image)))
    torch.testing.assert_close(reference(decode_rgb(data, "x")), expected, rtol=0, atol=0)
    fast = FastTransform(reference)(EncodedImage(data, "x"))
    assert fast.dtype == torch.uint8
    torch.testing.assert_close(DeviceTransform(ModelConfig(""), CPU)(fast[None])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(90, 60), (50, 100), (300, 200)])
def test_evaluation_at_height_and_width_covers_both_in_proportion(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    scale = max(32 / shape[0], 64 / shape[1])  # 28 and 56 pixels / 0.875: the image just covers 32 x 64
    whole = image.resize((round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.BICUBIC)
    top = round((whole.height - 28) / 2)
    left = round((whole.width - 56) / 2)
    expected = np.asarray(whole.crop((left, top, left + 56, top + 28)))
    reference = build(False, 28, 56)
    assert (levels(reference(image)) == expected).all()
    assert (levels(FastTransform(reference)(pixels)) == expected).all()


# decoding

EXIF_TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
FORMS: dict[str, Callable[[Image.Image], bytes]] = {
    "4:4:4": partial(encode, subsampling=0),
    "4:2:0": partial(encode, subsampling=2),
    "4:1:1": partial(encode, subsampling="4:1:1"),
    "progressive": partial(encode, progressive=True),
    "restarts": partial(encode, restart_marker_blocks=3),
    "stored as RGB": partial(encode, keep_rgb=True),
    "turned by EXIF": partial(encode, exif=EXIF_TURNED),
    "trailing bytes": lambda rgb: encode(rgb) + b"\0\0and more",
    "grey": lambda rgb: encode(rgb.convert("L")),
    "CMYK": lambda rgb: encode(rgb.convert("CMYK")),
    "PNG": lambda rgb: encode(rgb, "PNG"),
    "palette": lambda rgb: encode(rgb.quantize(16), "PNG", transparency=b"\x80\x40"),
    "alpha": lambda rgb: encode(rgb.convert("RGBA"), "PNG"),
    "16 bits": lambda rgb: encode(Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257), "PNG"),
    "WebP": lambda rgb: encode(rgb, "WEBP"),
}


@pytest.mark.filterwarnings("ignore:Palette images")  # of the expected one
@pytest.mark.parametrize("form", FORMS)
def test_pixels_are_exactly_pillows(form):
    rgb = photograph(97, 61)
    data = FORMS[form](rgb)
    expected = Image.open(BytesIO(data))
    # Pillow itself would clip 16 bits to 8
    expected = rgb.convert("L").convert("RGB") if form == "16 bits" else expected.convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torchvision 0.29 announces the end of its decoders
        warnings.simplefilter("ignore", DeprecationWarning)
        found = EncodedImage(data, "x").decode()
        np.testing.assert_array_equal(np.asarray(decode_rgb(data, "x")), np.asarray(expected))
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(levels(found), np.asarray(expected))


def test_plain_jpegs_are_decoded_without_pillow(monkeypatch):
    data = {form: FORMS[form](photograph(64, 48)) for form in ("4:4:4", "4:2:0", "progressive", "trailing bytes")}
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: pytest.fail("Pillow"))
    for form in ("4:4:4", "4:2:0", "progressive"):
        EncodedImage(data[form], "x").decode()
    with pytest.raises(pytest.fail.Exception):
        EncodedImage(data["trailing bytes"], "x").decode()


def outcome(read: Callable[[], Image.Image | Tensor]) -> np.ndarray | str:
    try:
        found = read()
    except InputError as error:
        return str(error)
    return levels(found) if isinstance(found, Tensor) else np.asarray(found)


def test_damaged_images_are_refused_where_pillow_refuses_and_else_decoded_alike(capfd):
    rng = random.Random(0)
    refused = 0
    for trial in range(150):
        form = ("4:2:0", "progressive", "restarts", "PNG", "grey")[trial % 5]
        data = bytearray(FORMS[form](photograph(64, 48, trial % 2)))
        # cut anywhere, or of a few bytes
        if trial % 3:
            del data[rng.randrange(2, len(data)) if trial % 3 == 1 else -rng.randrange(1, 9) :]
        for _ in range(trial % 4):
            data[rng.randrange(len(data))] = rng.randrange(256)
        expected = outcome(partial(decode_rgb, bytes(data), "some/file"))
        np.testing.assert_array_equal(outcome(EncodedImage(bytes(data), "some/file").decode), expected)
        refused += isinstance(expected, str) and expected.startswith("some/file: not a readable image (")
    assert 45 < refused < 125


# crops and operations


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("size", [(500, 375), (120, 90), (225, 1100)], ids=str)
def test_without_a_policy_pixels_are_timms_within_a_level_or_two(size, interpolation):
    data = encode(photograph(*size, which=size[0] % 2))
    reference = build(True, 224, 192, interpolation=interpolation, scale=(0.3, 0.8), vflip=0.5, **PLAIN)
    for seed in range(4):
        fast, timm = draw_both(reference, data, seed)
        difference = np.abs(fast - timm)
        assert difference.mean() < 0.05 and difference.max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2)], ids=str)
def test_images_of_few_pixels_are_enlarged(size):
    """timm's boxes may be empty, and beyond the last pixel."""
    pixels = np.full((*size, 3), 200, np.uint8)
    transform = FastTransform(build(True, 32, 48, scale=(0.01, 1.0), **PLAIN))
    for seed in range(200):
        seed_everything(seed)
        image = transform(pixels)
        assert image.shape == (3, 32, 48) and (image == 200).all()


@pytest.mark.parametrize("aa", ["none", "rand-m9-mstd0.5-inc1"])
def test_arrays_in_native_size_are_augmented_exactly_as_by_timm(aa):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    reference = build(True, 24, 40, native_size=True, **PLAIN | {"aa": aa})
    made = [draw_both(reference, pixels, seed) for seed in range(40)]
    for fast, timm in made:
        np.testing.assert_array_equal(fast, timm)
    assert len({fast.tobytes() for fast, _ in made}) > 30


@pytest.mark.parametrize(
    "augment",
    [
        {"aa": "rand-m15-n4-mstd0.5-inc1"},
        {"aa": "original-mstd0.5"},
        {"aa": "augmix-m5-w2-d2"},
        {"three_augment": True, "src": True},
    ],
    ids=str,
)
def test_the_same_operations_follow_with_the_same_strength(monkeypatch, augment):
    called = []
    apply = AugmentOp.__call__

    def record(self, image: Image.Image) -> Image.Image:
        # the state of the stream that the strength is drawn from
        called.append((self.name, random.getstate()))
        return apply(self, image)

    monkeypatch.setattr(AugmentOp, "__call__", record)
    data = encode(photograph(200, 150))
    reference = build(True, 64, 64, **augment, reprob=0.0)
    for seed in range(12):
        called.clear()
        fast, timm = draw_both(reference, data, seed)
        half = len(called) // 2
        assert called[:half] == called[half:]
        # Pillow resizes there in both
        if "src" in augment:
            np.testing.assert_array_equal(fast, timm)


def test_a_repeated_image_is_decoded_once(monkeypatch):
    decoded = []
    decode = EncodedImage.decode
    monkeypatch.setattr(EncodedImage, "decode", lambda self: decoded.append(self) or decode(self))
    fast = FastTransform(build(True, 64, 64, **PLAIN))
    one, two = (encode(photograph(120, 90, which)) for which in (0, 1))
    shown = []
    for data in (one, one, two, two, one):
        seed_everything(3)
        shown.append(fast(EncodedImage(data, "the same name")).numpy().tobytes())
    assert len(decoded) == 3
    assert shown[0] == shown[1] == shown[4] != shown[2] == shown[3]


# on the device

BATCH = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 3, 40, 60), dtype=np.uint8))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_batches_are_normalized_and_erased_as_timm_does(mode, count):
    """The main streams, seeded alike, give the same boxes and noise."""
    prepare = DeviceTransform(ModelConfig(""), CPU, AugmentConfig(reprob=0.8, remode=mode, recount=count))
    erase = RandomErasing(0.8, mode=mode, max_count=count, device="cpu")
    normalized = NORMALIZE(BATCH / 255)
    shares = []
    for seed in range(10):
        seed_everything(seed)
        found = prepare(BATCH)
        seed_everything(seed)
        torch.testing.assert_close(found, erase(normalized.clone()), rtol=0, atol=1e-6)
        shares.append((found - normalized).abs().amax((1, 2, 3)).gt(1e-3).float().mean().item())
    assert 0.6 < np.mean(shares) < 0.95


def test_what_is_not_to_be_erased_is_normalized_and_floats_are_both_already():
    for augment in (None, AugmentConfig(reprob=0.0), AugmentConfig(reprob=1.0, three_augment=True)):
        prepare = DeviceTransform(ModelConfig(""), CPU, augment)
        torch.testing.assert_close(prepare(BATCH), NORMALIZE(BATCH / 255), rtol=0, atol=1e-6)
    images = torch.randn(2, 3, 4, 4)
    assert DeviceTransform(ModelConfig(""), CPU, AugmentConfig(reprob=1.0))(images) is images
    half = ModelConfig("", mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.testing.assert_close(DeviceTransform(half, CPU)(BATCH), BATCH / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_the_device_normalizes_and_erases_as_the_cpu_does():
    cuda = Precision(torch.device("cuda"))
    for mode in ("const", "rand", "pixel"):
        made = []
        for precision in (CPU, CPU, cuda, cuda):
            seed_everything(5)
            prepare = DeviceTransform(ModelConfig(""), precision, AugmentConfig(reprob=0.8, remode=mode))
            made.append(prepare(BATCH.pin_memory()).cpu())
        # the boxes are the same everywhere, the noise on the same device
        erased = [(images - NORMALIZE(BATCH / 255)).abs() > 1e-3 for images in made]
        intact = ~(erased[0] | erased[2])
        torch.testing.assert_close(made[2] * intact, made[0] * intact, rtol=0, atol=1e-6)
        assert (erased[0] ^ erased[2]).float().mean() < 0.01
        assert torch.equal(made[0], made[1]) and torch.equal(made[2], made[3])
