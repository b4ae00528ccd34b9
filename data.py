"""Images to learn from: the CIFAR-10 and MNIST binary formats read by hand, two sets made by code, sparse pixels.

CIFAR-10   records of 1 label byte + 3072 pixel bytes: 1024 red, 1024 green, 1024 blue, row by row
MNIST      IDX: magic number, count, (height, width), all big-endian 32-bit, then the bytes
leaves     32 x 32 RGB, the dead-leaves model: discs that cover each other, radii from a power law
glyphs     28 x 28 grey, ten classes: digits of Pillow's built-in font under random transformations

An image becomes the neural field's problem by sparse_split: of its 1,024 pixels 204 are the input (clean, fixed), 204
others the output (to be denoised). A pixel is a coordinate (x, y) = index / (side - 1) in [0, 1], and a value.

    python data.py                         # fetches CIFAR-10 (or falls back) and draws sparse pixels: out/data.png
    python data.py --data leaves --seed 3

CIFAR-10: Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html. MNIST: LeCun et al. (1998). Dead leaves: Lee,
Mumford & Huang (IJCV 2001). This file needs nothing but torch, numpy and Pillow: copy it anywhere.
"""
import argparse
import gzip
import hashlib
import http.client
import math
import os
import shutil
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

CIFAR10_URLS = ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
MNIST_URLS = ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"]
MNIST_SHA256 = {  # of the unzipped files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
NO_NETWORK_SECONDS = 9  # the longest wait for a connection, over all addresses


class Unavailable(OSError):
    """A data set is not on disk and could not be fetched."""


# ---------------------------------------------------------------------------------------------------- the real sets


def load_cifar10(root, train):
    """CIFAR-10 from its binary version below root/cifar-10-batches-bin, fetched if it is not there.

    Returns (images uint8 (N, 3, 32, 32), labels uint8 (N,)): 50,000 or 10,000, fewer (with a notice) if a file holds
    fewer whole records. Raises Unavailable if it cannot be fetched, ValueError for a damaged file.
    """
    folder = Path(root) / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    if not all((folder / name).exists() for name in names):
        _fetch_cifar10(Path(root))
    records = np.concatenate([_read_cifar10(folder / name) for name in names])
    return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)), torch.from_numpy(records[:, 0].copy())


def _read_cifar10(path):
    size = path.stat().st_size
    if size == 0 or size % 3073 or size > 10_000 * 3073:
        raise ValueError(f"{path}: expected 10,000 records of 3,073 bytes (30,730,000 bytes), found {size:,} bytes; "
                         f"delete the file to fetch it again")
    records = np.fromfile(path, np.uint8).reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path}: expected labels 0 to 9, found {records[:, 0].max()} in record "
                         f"{records[:, 0].argmax()}: the file is corrupt; delete it to fetch it again")
    if len(records) < 10_000:
        print(f"notice: {path.name}: {len(records):,} of 10,000 images")
    return records


def _fetch_cifar10(root):
    archive, folder = root / "cifar-10-binary.tar.gz", root / "cifar-10-batches-bin"

    def check(path):
        with open(path, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != CIFAR10_MD5:
            raise ValueError(f"MD5 should be {CIFAR10_MD5}, is {md5}")

    download(CIFAR10_URLS, archive, check)
    folder.mkdir(exist_ok=True)
    wanted = {f"cifar-10-batches-bin/{name}.bin" for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]}
    with tarfile.open(archive) as tar:
        for member in tar:  # only plain files of the expected name and size, whatever else the archive holds
            target = root / member.name
            if member.name in wanted and member.isfile() and member.size == 10_000 * 3073 and not target.exists():
                temporary = target.with_suffix(".part")
                with tar.extractfile(member) as source, open(temporary, "wb") as copy:
                    shutil.copyfileobj(source, copy)
                temporary.replace(target)
    archive.unlink()


def load_mnist(root, train):
    """MNIST from its IDX files below root/MNIST/raw, gzipped or not, fetched if they are not there.

    Returns (images uint8 (N, 1, 28, 28), labels uint8 (N,)): 60,000 or 10,000.
    Raises Unavailable if it cannot be fetched, ValueError for a damaged file.
    """
    folder, prefix = Path(root) / "MNIST" / "raw", "train" if train else "t10k"
    images = _read_idx(_find_mnist(folder, f"{prefix}-images-idx3-ubyte"), (28, 28))
    labels = _read_idx(_find_mnist(folder, f"{prefix}-labels-idx1-ubyte"), ())
    if len(images) != len(labels):
        raise ValueError(f"{folder}: expected as many labels as images, found {len(images):,} images and "
                         f"{len(labels):,} labels; delete the {prefix} files to fetch them again")
    if labels.max() > 9:
        raise ValueError(f"{folder / prefix}-labels-idx1-ubyte: expected labels 0 to 9, found {labels.max()}; "
                         f"delete the file to fetch it again")
    return torch.from_numpy(images[:, None]), torch.from_numpy(labels)


def _find_mnist(folder, name):
    def check(path):
        try:
            with gzip.open(path) as file:
                sha = hashlib.sha256(file.read(60_000 * 784 + 17)).hexdigest()
        except (EOFError, zlib.error) as problem:
            raise ValueError(f"not a whole gzip file ({problem})") from None
        if sha != MNIST_SHA256[name]:
            raise ValueError(f"SHA-256 should be {MNIST_SHA256[name]}, is {sha}")

    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    download([url + f"{name}.gz" for url in MNIST_URLS], folder / f"{name}.gz", check)
    return folder / f"{name}.gz"


def _read_idx(path, shape):
    """One IDX file of unsigned bytes whose items have the given shape: uint8 (N, *shape)."""
    again = "delete the file to fetch it again"
    limit = 60_000 * math.prod(shape) + 16  # an honest file is never longer: stops a gzip bomb
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise ValueError(f"{path}: expected a gzip file, found a damaged one ({problem}); {again}") from None
    header = 4 * (2 + len(shape))
    if len(content) <= header:
        raise ValueError(f"{path}: expected an IDX header and data, found {len(content)} bytes; {again}")
    magic, count, *found = (int(n) for n in np.frombuffer(content[:header], ">u4"))
    expected = 0x0800 + 1 + len(shape)  # 08: unsigned bytes; then the number of dimensions
    if magic != expected:
        raise ValueError(f"{path}: expected magic number {expected:#010x}, found {magic:#010x}; {again}")
    if tuple(found) != shape:
        raise ValueError(f"{path}: expected items of shape {shape}, found {tuple(found)}; {again}")
    if count == 0 or len(content) != header + count * math.prod(shape):
        raise ValueError(f"{path}: expected {count:,} items in {header + count * math.prod(shape):,} bytes, "
                         f"found {'more than ' * (len(content) > limit)}{min(len(content), limit):,} bytes; {again}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(count, *shape).copy()


def download(urls, path, check):
    """Fetch the first address that works to `path`; check(temporary file) raises ValueError for a wrong content.

    Written to a temporary name and renamed once checked, so that a broken download is never taken for data.
    Raises Unavailable with the reason for each address.
    """
    temporary = path.with_name(path.name + ".part")
    reasons = []
    for url in urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _copy(_connect(url, NO_NETWORK_SECONDS / len(urls)), temporary, path.name)
            check(temporary)
            temporary.replace(path)
            return
        except (OSError, ValueError, http.client.HTTPException) as problem:
            reasons.append(f"{url}: {getattr(problem, 'reason', problem)}")
        finally:
            temporary.unlink(missing_ok=True)
    raise Unavailable(f"cannot fetch {path.name} ({'; '.join(reasons)})")


def _connect(url, seconds):
    """urlopen in a thread of its own, because the time limit of a socket does not cover looking up the name."""
    result = []

    def connect():
        try:
            result.append(urllib.request.urlopen(url, timeout=seconds))
        except Exception as problem:  # whatever it is, the caller's thread is to hear of it
            result.append(problem)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _copy(response, path, name):
    total, done, shown = int(response.headers.get("Content-Length") or 0), 0, 0.0
    with response, open(path, "wb") as file:
        while chunk := response.read(1 << 18):
            file.write(chunk)
            done += len(chunk)
            if sys.stdout.isatty() and time.time() - shown > 0.2:
                shown = time.time()
                print(f"\r{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", end="", flush=True)
    print(f"\r{name}: {done / 1e6:.1f} MB   ")
    if total and done != total:
        raise ValueError(f"the connection broke off after {done:,} of {total:,} bytes")


# --------------------------------------------------------------------------------------------- sets made by code


def make_leaves(count, seed):
    """Dead leaves: random discs painted over each other, radii r with density r^-3 from 3 to 40 pixels.

    Returns (images uint8 (count, 3, 32, 32), labels, all 0). Tiles cut from large canvases; count and seed decide all.
    """
    rng, tiles, smallest, largest, side = np.random.default_rng(seed), [], 3.0, 40.0, 1024
    mean_area = math.pi * 2 * math.log(largest / smallest) / (smallest**-2 - largest**-2)
    discs = int(5 * side**2 / mean_area)  # each place is covered 5 times on average
    for _ in range(0, count, (side // 32) ** 2):
        u = rng.random((discs, 1))
        radius = (smallest**-2 - u * (smallest**-2 - largest**-2)) ** -0.5  # inverse of the distribution function
        centre = rng.random((discs, 2)) * (side + 2 * largest) - largest
        colour = rng.normal(122, 55, (discs, 1)) + rng.normal(0, 22, (discs, 3))  # grey, with a little colour
        canvas = Image.new("RGB", (2 * side, 2 * side), (122, 122, 122))
        draw = ImageDraw.Draw(canvas)
        boxes = np.concatenate([2 * (centre - radius), 2 * (centre + radius)], axis=1).tolist()
        for box, fill in zip(boxes, colour.clip(0, 255).astype(int).tolist()):
            draw.ellipse(box, fill=tuple(fill))
        pixels = np.asarray(canvas.reduce(2))  # drawn at twice the size: smooth edges
        tiles.append(pixels.reshape(side // 32, 32, side // 32, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32))
    return torch.from_numpy(np.concatenate(tiles)[:count]), torch.zeros(count, dtype=torch.uint8)


def make_glyphs(count, seed):
    """Digits of Pillow's font, stroke, rotation, scale and shift at random.

    Returns (images uint8 (count, 1, 28, 28), labels uint8 0 to 9); count and seed decide all.
    """
    rng, masters = np.random.default_rng(seed), {}
    for digit in range(10):
        for stroke in range(3):
            masters[digit, stroke] = image = Image.new("L", (40, 40))
            ImageDraw.Draw(image).text((20, 20), str(digit), fill=255, font=ImageFont.load_default(size=30),
                                       anchor="mm", stroke_width=stroke / 2)
    labels, strokes = rng.integers(0, 10, count), rng.integers(0, 3, count)
    angle, shift = rng.uniform(-0.35, 0.35, count), rng.uniform(-2.5, 2.5, (count, 2))
    scale = 1.25 * rng.uniform(0.8, 1.25, (count, 1)) * rng.uniform(0.9, 1.1, (count, 2))
    images = np.empty((count, 1, 28, 28), np.uint8)
    for i in range(count):  # from a pixel of the small picture to a place in the master: p -> A (p - middle) + 20
        cos, sin, (sx, sy), (mx, my) = math.cos(angle[i]), math.sin(angle[i]), scale[i], 14 + shift[i]
        a, b, d, e = sx * cos, sx * sin, -sy * sin, sy * cos
        affine = (a, b, 20 - a * mx - b * my, d, e, 20 - d * mx - e * my)
        images[i, 0] = masters[labels[i], strokes[i]].transform((28, 28), Image.Transform.AFFINE, affine,
                                                                Image.Resampling.BICUBIC)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.uint8))


BUILT_IN = {"leaves": (make_leaves, 20_480, 1_024), "glyphs": (make_glyphs, 20_000, 2_000)}


def load_built_in(name, root, train):
    """`leaves` or `glyphs`, made once and kept below root/built-in. Returns (images uint8, labels uint8)."""
    make, train_count, test_count = BUILT_IN[name]
    path = Path(root) / "built-in" / f"{name}-{'train' if train else 'test'}.npz"
    try:
        with np.load(path) as file:
            return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # not there yet, or damaged: it costs seconds to make again
    images, labels = make(train_count if train else test_count, seed=1 if train else 2)
    temporary = path.with_name(f"{path.stem}-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, images=images.numpy(), labels=labels.numpy())
        temporary.replace(path)
    except OSError as problem:
        print(f"notice: {name} is not kept for next time ({problem})")
    return images, labels


STAND_IN = {"cifar10": "leaves", "mnist": "glyphs"}
DATASETS = ["auto", *STAND_IN, *BUILT_IN]


def load_dataset(name, root, train, real="cifar10"):
    """The set called `name`; "auto" is `real` ("cifar10" or "mnist") or, where that cannot be had, its stand-in.

    Returns (the name of what was loaded, images uint8 (N, C, H, W), labels uint8 (N,)).
    Raises Unavailable or ValueError as the loaders do; a damaged file is never papered over with the stand-in.
    """
    loaders = {"cifar10": load_cifar10, "mnist": load_mnist}
    if name == "auto":
        try:
            return real, *loaders[real](root, train)
        except Unavailable as problem:
            name = STAND_IN[real]
            print(f"*** NO {real.upper()}: {problem}")
            print(f"*** USING THE BUILT-IN SET '{name}' INSTEAD: its figures are not {real} figures (--data {real} insists)")
    if name in BUILT_IN:
        return name, *load_built_in(name, root, train)
    try:
        return name, *loaders[name](root, train)
    except Unavailable as problem:
        raise Unavailable(f"{problem}; put the files below {root}, or use --data {STAND_IN[name]}") from None


# ---------------------------------------------------------------------------------------------------- sparse pixels


def fixed_keys(seed, indices, num_pixels):
    """A random number for every pixel of an image that is a function of (seed, image index, pixel) alone.

    indices: int64 (B,). Returns int64 (B, num_pixels), for sparse_split's `keys`. The mixing is the finaliser of
    SplitMix64 (Steele et al., OOPSLA 2014), in int64 arithmetic that wraps around.
    """
    pixel = torch.arange(num_pixels, device=indices.device)
    start = (seed * 0x9E3779B97F4A7 + 2**63) % 2**64 - 2**63
    x = start + indices[:, None] * 0x2545F4914F6CDD1D + pixel * 0x1B873593CC9E2D51
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # the mask makes the shift unsigned
    return x


def sparse_split(images, input_ratio=0.2, output_ratio=0.2, generator=None, keys=None):
    """Choose input and output pixels of every image, at random and apart from each other.

    images: (B, C, H, W), uint8 (becomes [-1, 1]) or float (taken as it is). input_ratio, output_ratio: shares of the
    pixels, int(H * W * ratio) of them; output_ratio None takes all that are not input. The pixels with the lowest
    keys (B, H * W) are the input, the next the output; without keys they are drawn with `generator` (on the images'
    device), fresh each time.

    Returns a dict of input_coords (B, N_in, 2), input_values (B, N_in, C), output_coords (B, N_out, 2), output_values
    (B, N_out, C), input_indices (B, N_in), output_indices (B, N_out), full_image (B, C, H, W); a coordinate is
    (x, y) in [0, 1], an index is y * W + x. Raises ValueError for ratios that leave no pixel or want too many.
    """
    batch, channels, height, width = images.shape
    pixels = height * width
    n_in = int(pixels * input_ratio) if 0 < input_ratio < 1 else 0
    n_out = pixels - n_in if output_ratio is None else int(pixels * output_ratio) if 0 < output_ratio < 1 else 0
    if n_in < 1 or n_out < 1 or n_in + n_out > pixels:
        raise ValueError(f"input ratio {input_ratio} and output ratio {output_ratio} must each give at least one of the "
                         f"{pixels} pixels and not more than all together")
    if keys is None:
        keys = torch.rand(batch, pixels, generator=generator, device=images.device)
    order = keys.argsort(dim=1)
    full_image = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
    values = full_image.flatten(2).transpose(1, 2)  # (B, H * W, C)
    side = torch.tensor([max(width - 1, 1), max(height - 1, 1)], device=images.device)
    split = {"full_image": full_image}
    for name, indices in (("input", order[:, :n_in]), ("output", order[:, n_in:n_in + n_out])):
        split[f"{name}_indices"] = indices
        split[f"{name}_coords"] = torch.stack([indices % width, indices // width], dim=-1) / side
        split[f"{name}_values"] = values.gather(1, indices[:, :, None].expand(-1, -1, channels))
    return split


# ---------------------------------------------------------------------------------------------------- pictures


def scatter_pixels(indices, values, shape, background=0.0):
    """Put pixels (B, N), values (B, N, C) into images of shape (B, C, H, W) that are `background` elsewhere.

    background: a number or a tensor that broadcasts to the shape. Returns a new tensor.
    """
    image = torch.as_tensor(background, dtype=values.dtype, device=values.device).expand(shape).flatten(2).clone()
    return image.scatter(2, indices[:, None, :].expand(-1, shape[1], -1), values.transpose(1, 2)).view(shape)


def image_grid(rows, column_labels=(), row_labels=(), captions=None, zoom=4):
    """A labelled grid as a PIL image. rows: lists of images (C, H, W) with 1 or 3 channels in [0, 1], all one size.

    column_labels stand above, row_labels to the left, captions (a list of strings for every row) below each image.
    Pixels are enlarged `zoom` times, square and sharp.
    """
    height, width = (zoom * n for n in rows[0][0].shape[1:])
    font, gap = ImageFont.load_default(size=13), 6
    left = 12 + int(max((font.getlength(label) for label in row_labels), default=0))
    top = 24 if column_labels else gap
    step_y = height + gap + (18 if captions else 0)
    size = (left + (width + gap) * max(len(row) for row in rows), top + step_y * len(rows))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            array = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()
            place = (left + x * (width + gap), top + y * step_y)
            grid.paste(Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST), place)
            if captions and x < len(captions[y]):
                draw.text((place[0] + width / 2, place[1] + height + 2), captions[y][x], fill="#444", font=font, anchor="ma")
    for x, label in enumerate(column_labels):
        draw.text((left + x * (width + gap) + width / 2, 5), label, fill="black", font=font, anchor="ma")
    for y, label in enumerate(row_labels):
        draw.text((6, top + y * step_y + height / 2), label, fill="black", font=font, anchor="lm")
    return grid


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATASETS, default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are, or are put")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.error = fail
    args = parser.parse_args()
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed must be between 0 and 2147483647, got {args.seed}")

    name, images, labels = load_dataset(args.data, args.data_dir, train=False)
    few = images[:8]
    split = sparse_split(few, keys=fixed_keys(args.seed, torch.arange(len(few)), few[0, 0].numel()))
    shape = split["full_image"].shape
    given = scatter_pixels(split["input_indices"], split["input_values"], shape)
    asked = scatter_pixels(split["output_indices"], split["output_values"], shape)
    both = scatter_pixels(split["output_indices"], split["output_values"], shape, given)
    rows = [list((kind + 1) / 2) for kind in (split["full_image"], given, asked, both)]
    grid = image_grid(rows, row_labels=["image", "input pixels", "output pixels", "both"])
    args.out.mkdir(parents=True, exist_ok=True)
    grid.save(args.out / "data.png")
    print(f"{name}: {len(images):,} test images of {tuple(images.shape[1:])}, labels {int(labels.min())} to "
          f"{int(labels.max())}, {split['input_indices'].shape[1]} input and {split['output_indices'].shape[1]} "
          f"output pixels each")
    print(f"picture: {args.out / 'data.png'}")


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        fail(problem)
    except KeyboardInterrupt:
        raise SystemExit(130)
