"""Images to learn from, and the sparse pixels that the neural field sees.

CIFAR-10   records of 1 label byte and 3,072 pixel bytes: 1,024 red, 1,024 green, 1,024 blue
MNIST      IDX: magic number, count, (height, width), all big-endian 32-bit, then the bytes
leaves     32 x 32 colour, made here: discs that cover each other ("dead leaves")
glyphs     28 x 28 grey, made here: digits of Pillow's font, turned, scaled and shifted
a folder   every picture below it, as 32 x 32 colour or 28 x 28 grey

sparse_split turns an image into a problem for the neural field: 204 of its 1,024 pixels are the
input (clean, fixed), 204 others the output (to be denoised). A pixel is a value and a coordinate
(x, y) = (column, row) / (side - 1) in [0, 1].

    python data.py                         # CIFAR-10 (or leaves) as sparse pixels: out/data.png
    python data.py --data leaves --seed 3

CIFAR-10: Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html. MNIST: LeCun et al.
(1998). Dead leaves: Lee, Mumford & Huang (IJCV 2001). This file needs only torch, numpy and
Pillow: copy it anywhere.
"""
import argparse
import gzip
import hashlib
import math
import shutil
import sys
import tarfile
import urllib.request
import warnings
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

CIFAR10_URLS = ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
MNIST_URLS = ["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"]
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


class Unavailable(OSError):
    """A data set is not on disk and could not be fetched."""


# -------------------------------------------------------------------------------- real data sets


def load_cifar10(root, train):
    """CIFAR-10, binary version, from root/cifar-10-batches-bin; fetched if it is not there.

    Returns (images uint8 (N, 3, 32, 32), labels uint8 (N,)) with N = 50,000 or 10,000; a shorter
    file gives fewer images and a notice. Raises Unavailable if it is missing and cannot be
    fetched, ValueError for a damaged file.
    """
    folder = Path(root) / "cifar-10-batches-bin"
    paths = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
    paths = paths if train else [folder / "test_batch.bin"]
    if not all(path.exists() for path in paths):
        fetch_cifar10(Path(root))
    parts = []
    for path in paths:
        size = path.stat().st_size
        if size == 0 or size % 3073 or size > 10_000 * 3073:
            raise ValueError(f"{path}: expected 10,000 records of 3,073 bytes, found {size:,} "
                             f"bytes; delete the file to fetch it again")
        records = np.fromfile(path, np.uint8).reshape(-1, 3073)  # label, then 3 x 32 x 32 pixels
        if records[:, 0].max() > 9:
            raise ValueError(f"{path}: expected labels 0 to 9, found {records[:, 0].max()}; "
                             f"delete the file to fetch it again")
        if len(records) < 10_000:
            print(f"notice: {path.name} holds {len(records):,} of 10,000 images")
        parts.append(records)
    records = torch.from_numpy(np.concatenate(parts))
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].clone()


def fetch_cifar10(root):
    """Download the archive, unpack it, and move the files into place."""
    archive, folder = root / "cifar-10-binary.tar.gz", root / "cifar-10-batches-bin"
    download(CIFAR10_URLS, archive, CIFAR10_MD5)
    with tarfile.open(archive) as tar:
        tar.extractall(root / "unpacked", filter="data")  # nothing outside this folder
    folder.mkdir(exist_ok=True)
    for path in (root / "unpacked" / folder.name).iterdir():
        path.replace(folder / path.name)
    shutil.rmtree(root / "unpacked")
    archive.unlink()


def load_mnist(root, train):
    """MNIST from its IDX files in root/MNIST/raw, gzipped or not; fetched if they are not there.

    Returns (images uint8 (N, 1, 28, 28), labels uint8 (N,)) with N = 60,000 or 10,000.
    Raises Unavailable if it is missing and cannot be fetched, ValueError for a damaged file.
    """
    folder, prefix = Path(root) / "MNIST" / "raw", "train" if train else "t10k"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte", (28, 28))
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", ())
    if len(images) != len(labels) or labels.max() > 9:
        raise ValueError(f"{folder}: expected a label from 0 to 9 for each image, found "
                         f"{len(images):,} images and {len(labels):,} labels up to "
                         f"{labels.max()}; delete the {prefix} files to fetch them again")
    return torch.from_numpy(images[:, None]), torch.from_numpy(labels)


def read_idx(path, shape):
    """The items of an IDX file of unsigned bytes, or of path.gz: uint8 (N, *shape).

    path.gz is fetched if neither is there. Raises ValueError for a damaged file.
    """
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    if not path.exists():
        download([url + path.name for url in MNIST_URLS], path, MNIST_MD5[path.name])
    item, header = math.prod(shape), 4 * (2 + len(shape))
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                content = file.read(16 + 60_000 * item + 1)  # never unpacks more than that
        else:
            content = path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise ValueError(f"{path}: expected a gzip file, found a damaged one ({problem}); "
                         f"delete the file to fetch it again") from None
    # magic number (08: unsigned bytes, then the number of dimensions), count, item shape
    expected = [0x0800 + 1 + len(shape), (len(content) - header) // item, *shape]
    found = np.frombuffer(content[:header], ">u4").tolist() if len(content) > header else []
    if found != expected or len(content) != header + found[1] * item:
        raise ValueError(f"{path}: expected an IDX file with the header {expected}, found "
                         f"{len(content):,} bytes with the header {found}; delete the file to "
                         f"fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(-1, *shape).copy()


def download(urls, path, md5):
    """Fetch the first address that works and whose content has this MD5 checksum.

    The file gets its name only after the check. Raises Unavailable with a reason for each address.
    """
    temporary, reasons = path.with_name(path.name + ".part"), []
    for url in urls:
        print(f"downloading {url}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=10) as response:
                with open(temporary, "wb") as file:
                    while chunk := response.read(1 << 20):
                        file.write(chunk)
            found = hashlib.md5(temporary.read_bytes()).hexdigest()
            if found != md5:
                raise ValueError(f"its MD5 should be {md5} and is {found}")
            temporary.replace(path)
            return
        except (OSError, ValueError, HTTPException) as problem:
            reasons.append(f"{url}: {getattr(problem, 'reason', problem)}")
        finally:
            temporary.unlink(missing_ok=True)
    raise Unavailable(f"cannot fetch {path.name} ({'; '.join(reasons)})")


# -------------------------------------------------------- built-in sets and your own pictures


def make_leaves(count, seed):
    """Dead leaves: random discs painted over each other, radii with density r^-3, 3 to 40 pixels.

    Returns (images uint8 (count, 3, 32, 32), labels, all 0), a function of count and seed.
    """
    rng, tiles, smallest, largest, side = np.random.default_rng(seed), [], 3.0, 40.0, 1024
    mean_area = 2 * math.pi * math.log(largest / smallest) / (smallest**-2 - largest**-2)
    discs = int(5 * side**2 / mean_area)  # 5 times the area of the canvas
    for _ in range(0, count, (side // 32) ** 2):
        u = rng.random((discs, 1))  # radius: the inverse of its distribution function at u
        radius = (smallest**-2 - u * (smallest**-2 - largest**-2)) ** -0.5
        centre = rng.random((discs, 2)) * (side + 2 * largest) - largest
        colour = rng.normal(122, 55, (discs, 1)) + rng.normal(0, 22, (discs, 3))
        canvas = Image.new("RGB", (2 * side, 2 * side), (122, 122, 122))
        draw = ImageDraw.Draw(canvas)
        boxes = np.concatenate([2 * (centre - radius), 2 * (centre + radius)], axis=1)
        for box, fill in zip(boxes.tolist(), colour.clip(0, 255).astype(int).tolist()):
            draw.ellipse(box, fill=tuple(fill))
        pixels = torch.from_numpy(np.array(canvas.reduce(2)))  # twice the size: smooth edges
        squares = pixels.permute(2, 0, 1).unfold(1, 32, 32).unfold(2, 32, 32)
        tiles.append(squares.flatten(1, 2).transpose(0, 1))  # (1024, 3, 32, 32)
    return torch.cat(tiles)[:count].contiguous(), torch.zeros(count, dtype=torch.uint8)


def make_glyphs(count, seed):
    """Digits of Pillow's font with a random stroke, rotation, scale and shift.

    Returns (images uint8 (count, 1, 28, 28), labels uint8 0 to 9), a function of count and seed.
    """
    rng, font, digits = np.random.default_rng(seed), ImageFont.load_default(size=30), {}
    for digit in range(10):
        for stroke in range(3):
            image = digits[digit, stroke] = Image.new("L", (40, 40))
            ImageDraw.Draw(image).text((20, 20), str(digit), fill=255, font=font, anchor="mm",
                                       stroke_width=stroke / 2)
    labels, strokes = rng.integers(0, 10, count), rng.integers(0, 3, count)
    angles, shifts = rng.uniform(-0.35, 0.35, count), rng.uniform(-2.5, 2.5, (count, 2))
    scales = rng.uniform(1.0, 1.56, (count, 1)) * rng.uniform(0.9, 1.1, (count, 2))
    images = np.empty((count, 1, 28, 28), np.uint8)
    for i, (angle, (sx, sy), shift) in enumerate(zip(angles, scales, shifts)):
        # affine map from a pixel of the result to a place in the 40 x 40 picture
        a, b, d, e = (sx * math.cos(angle), sx * math.sin(angle),
                      -sy * math.sin(angle), sy * math.cos(angle))
        x, y = 14 + shift
        matrix = (a, b, 20 - a * x - b * y, d, e, 20 - d * x - e * y)
        images[i, 0] = digits[labels[i], strokes[i]].transform(
            (28, 28), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.uint8))


def open_picture(path):
    """Any picture that Pillow reads, as a Pillow image, turned as its EXIF data says.

    Raises ValueError for a file that is no picture, is damaged, or is suspiciously large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them at 255
                    image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype("u1"))
                image.load()
                return image
    except Exception as problem:  # Pillow's readers of damaged files raise all kinds of things
        reason = str(problem).split("\n")[0]
        raise ValueError(f"cannot use {path} as a picture: {reason}") from None


def square_picture(image, channels, side):
    """The middle square of a Pillow image, resized: uint8 (channels, side, side)."""
    image = image.convert("RGB" if channels == 3 else "L")
    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).view(side, side, channels).permute(2, 0, 1)


def load_folder(folder, train, channels, side):
    """Every picture below a folder. The tenth whose names have the lowest hashes is the test set.

    Returns (images uint8 (N, channels, side, side), labels, all 0). Raises ValueError if there
    are fewer than 20 pictures.
    """
    pictures, others = [], 0
    for path in Path(folder).rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix().encode(errors="surrogateescape")
            try:
                image = square_picture(open_picture(path), channels, side)
                pictures.append((zlib.crc32(name), name, image))
            except ValueError:
                others += 1
    count = len(pictures)
    if others:
        print(f"notice: {folder}: {others:,} of {count + others:,} files are not pictures")
    if count < 20:
        raise ValueError(f"{folder} holds {count} pictures that can be read: at least 20 are "
                         f"needed, a tenth of them for the test set")
    pictures.sort(key=lambda picture: picture[:2])
    chosen = pictures[count // 10:] if train else pictures[:count // 10]
    images = torch.stack([image for _, _, image in chosen])
    return images, torch.zeros(len(images), dtype=torch.uint8)


BUILT_IN = {"leaves": (make_leaves, 20_480, 1_024), "glyphs": (make_glyphs, 20_000, 2_000)}
STAND_IN = {"cifar10": "leaves", "mnist": "glyphs"}


def load_dataset(name, root, train, real="cifar10"):
    """Images and labels of "cifar10", "mnist", "leaves", "glyphs", "auto" or a folder of pictures.

    real: "cifar10" or "mnist", what "auto" means if it can be had (if not, its built-in stand-in
    is used, with a notice), and whose image size a folder's pictures get.
    Returns (name of what was loaded, images uint8 (N, C, H, W), labels uint8 (N,)). Raises
    Unavailable for a real data set that is missing, ValueError for a damaged file or another name.
    """
    if name in BUILT_IN:
        make, train_count, test_count = BUILT_IN[name]
        return name, *make(train_count if train else test_count, seed=1 if train else 2)
    if name not in ("auto", "cifar10", "mnist"):
        if not Path(name).is_dir():
            raise ValueError(f"--data must be auto, cifar10, mnist, leaves, glyphs or a folder of "
                             f"pictures; {name} is none of them")
        return name, *load_folder(name, train, *((3, 32) if real == "cifar10" else (1, 28)))
    wanted = real if name == "auto" else name
    try:
        return wanted, *(load_cifar10 if wanted == "cifar10" else load_mnist)(root, train)
    except Unavailable as problem:
        if name != "auto":
            raise Unavailable(f"{problem}; put the files below {root}, or use --data "
                              f"{STAND_IN[name]}") from None
        print(f"*** NO {real.upper()}: {problem}\n*** USING THE BUILT-IN SET '{STAND_IN[real]}' "
              f"INSTEAD: figures are not {real} figures (--data {real} makes this an error)")
    return load_dataset(STAND_IN[real], root, train)


# --------------------------------------------------------------------------------- sparse pixels


def fixed_order(seed, indices, num_pixels):
    """A random number for each pixel of each image: a function of (seed, image index, pixel).

    indices: int64 (B,), which images. Returns float32 (B, num_pixels) on their device, for
    sparse_split's `order`.
    """
    rows = [np.random.default_rng((seed, index)).random(num_pixels) for index in indices.tolist()]
    return torch.from_numpy(np.stack(rows)).to(indices.device, torch.float32)


def sparse_split(images, input_ratio=0.2, output_ratio=0.2, generator=None, order=None):
    """Choose input and output pixels of each image at random, no pixel twice.

    images: (B, C, H, W), uint8 (mapped to [-1, 1]) or float (taken as they are). input_ratio,
    output_ratio: int(H * W * ratio) pixels each; output_ratio None takes all that are not input.
    order: (B, H * W), or None to draw it with `generator`; the pixels with the lowest numbers are
    the input, the next the output.
    Returns a dict: input_coords (B, N_in, 2), input_values (B, N_in, C), output_coords
    (B, N_out, 2), output_values (B, N_out, C), input_indices (B, N_in), output_indices
    (B, N_out), full_image (B, C, H, W). A coordinate is (x, y) in [0, 1], an index is y * W + x.
    Raises ValueError for ratios that leave no pixel or need too many.
    """
    batch, channels, height, width = images.shape
    pixels = height * width
    n_in = int(pixels * input_ratio) if 0 < input_ratio < 1 else 0
    if output_ratio is None:
        n_out = pixels - n_in
    else:
        n_out = int(pixels * output_ratio) if 0 < output_ratio < 1 else 0
    if n_in < 1 or n_out < 1 or n_in + n_out > pixels:
        raise ValueError(f"input ratio {input_ratio} and output ratio {output_ratio} must each "
                         f"take at least one of {pixels} pixels, and together at most all")
    if order is None:
        order = torch.rand(batch, pixels, generator=generator, device=images.device)
    order = order.argsort(dim=1, stable=True)
    full_image = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
    values = full_image.flatten(2).transpose(1, 2)  # (B, H * W, C)
    split = {"full_image": full_image}
    for name, indices in (("input", order[:, :n_in]), ("output", order[:, n_in:n_in + n_out])):
        x, y = indices % width / max(width - 1, 1), indices // width / max(height - 1, 1)
        split[f"{name}_indices"] = indices
        split[f"{name}_coords"] = torch.stack([x, y], dim=-1)
        split[f"{name}_values"] = values.gather(1, indices[:, :, None].expand(-1, -1, channels))
    return split


# -------------------------------------------------------------------------------------- pictures


def scatter_pixels(indices, values, shape, background=0.0):
    """Pixels at indices (B, N) with values (B, N, C) as images of `shape` (B, C, H, W).

    background: what the other pixels are, a number or a tensor that broadcasts to the shape.
    """
    image = torch.as_tensor(background, dtype=values.dtype, device=values.device)
    image = image.expand(shape).flatten(2)
    return image.scatter(2, indices[:, None].expand(-1, shape[1], -1), values.mT).view(shape)


def heat(error, limit=0.5):
    """Absolute error (C, H, W) as colours (3, H, W): black 0, red, yellow, white from `limit`."""
    level = 3 * (error.abs().mean(0) / limit).clamp(0, 1)
    return torch.stack([level.clamp(0, 1), (level - 1).clamp(0, 1), (level - 2).clamp(0, 1)])


def image_grid(rows, column_labels=(), row_labels=(), captions=None, zoom=4):
    """A labelled grid of images as a Pillow image.

    rows: lists of images (C, H, W) of one size, 1 or 3 channels in [0, 1]. captions: a list of
    strings for each row, written below the images. zoom: size of a pixel in the picture.
    """
    height, width = (zoom * n for n in rows[0][0].shape[1:])
    font, gap = ImageFont.load_default(size=13), 6
    left = 12 + int(max((font.getlength(label) for label in row_labels), default=0))
    top, step_x = 24 if column_labels else gap, width + gap
    step_y = height + gap + (18 if captions else 0)
    size = left + step_x * max(len(row) for row in rows), top + step_y * len(rows)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            pixels = (image.clamp(0, 1) * 255).round().byte().cpu().expand(3, -1, -1)
            tile = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            x, y = left + j * step_x, top + i * step_y
            grid.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
            if captions:
                draw.text((x + width / 2, y + height + 2), captions[i][j], fill="#444", font=font,
                          anchor="ma")
    for j, label in enumerate(column_labels):
        draw.text((left + j * step_x + width / 2, 5), label, fill="black", font=font, anchor="ma")
    for i, label in enumerate(row_labels):
        draw.text((6, top + i * step_y + height / 2), label, fill="black", font=font, anchor="lm")
    return grid


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="auto",
                        help="auto, cifar10, mnist, leaves, glyphs or a folder of pictures")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    args = parser.parse_args()

    name, images, _ = load_dataset(args.data, args.data_dir, train=False)
    few = images[:8]
    order = fixed_order(args.seed % 2**32, torch.arange(len(few)), few[0, 0].numel())
    split = sparse_split(few, order=order)
    image = split["full_image"]
    given = scatter_pixels(split["input_indices"], split["input_values"], image.shape)
    query = scatter_pixels(split["output_indices"], split["output_values"], image.shape)
    rows = [list(x / 2 + 0.5) for x in (image, given, query, given + query)]
    args.out.mkdir(parents=True, exist_ok=True)
    labels = ["image", "input pixels", "output pixels", "both"]
    image_grid(rows, row_labels=labels).save(args.out / "data.png")
    print(f"{name}: {len(images):,} test images of {tuple(images.shape[1:])}, "
          f"{split['input_indices'].shape[1]} input and {split['output_indices'].shape[1]} output "
          f"pixels each\npicture: {args.out / 'data.png'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
