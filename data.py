"""Images to learn from, and the sparse pixels that the neural field sees.

CIFAR-10   records of 1 label byte and 3,072 pixel bytes: 1,024 red, 1,024 green, 1,024 blue
MNIST      IDX: magic number, count, (height, width), all big-endian 32-bit, then the bytes
leaves     32 x 32 colour, made here: overlapping discs ("dead leaves")
glyphs     28 x 28 grey, made here: digits of Pillow's font, turned, scaled and shifted
a folder   every picture below it, as 32 x 32 colour or 28 x 28 grey

    python data.py                         # CIFAR-10 (or leaves) as sparse pixels: out/data.png

CIFAR-10: Krizhevsky (2009). MNIST: LeCun et al. (1998). Dead leaves: Lee, Mumford & Huang (IJCV
2001). This file needs only torch, numpy and Pillow: copy it anywhere.
"""
import argparse
import contextlib
import gzip
import hashlib
import math
import shutil
import sys
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

CIFAR10_URLS = ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
MNIST_URLS = ["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"]
MNIST_MD5 = {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
             "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
             "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
             "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}
FETCH_AGAIN = "delete the file to fetch it again"


def load_cifar10(root, train):
    """CIFAR-10, binary version, from root/cifar-10-batches-bin; fetched if it is not there.

    Returns (images uint8 (N, 3, 32, 32), labels uint8 (N,)); N is 50,000 or 10,000, or fewer,
    with a notice. Raises ConnectionError if it cannot be fetched, ValueError for a damaged file.
    """
    folder = Path(root) / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    if not all((folder / name).exists() for name in names):
        archive = Path(root) / "cifar-10-binary.tar.gz"
        download(CIFAR10_URLS, archive, CIFAR10_MD5)
        shutil.unpack_archive(archive, root, filter="data")  # nothing outside this folder
        archive.unlink()
    records = []
    for name in names:
        content = np.fromfile(folder / name, np.uint8, count=30_730_001)
        if len(content) not in range(3073, 30_730_001, 3073) or content[::3073].max() > 9:
            raise ValueError(f"{folder / name}: expected 10,000 records of 3,073 bytes, the first "
                             f"0 to 9, not these {len(content):,} bytes; {FETCH_AGAIN}")
        if len(content) < 30_730_000:
            print(f"notice: {name} holds {len(content) // 3073:,} of 10,000 images")
        records.append(content.reshape(-1, 3073))  # a label, then 3 x 32 x 32 pixels
    records = torch.from_numpy(np.concatenate(records))
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].clone()


def load_mnist(root, train):
    """MNIST from its IDX files in root/MNIST/raw, gzipped or not; fetched if they are not there.

    Returns (images uint8 (N, 1, 28, 28), labels uint8 (N,)). Raises as load_cifar10 does.
    """
    folder, prefix = Path(root) / "MNIST" / "raw", "train" if train else "t10k"
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte", (28, 28))
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte", ())
    if len(images) != len(labels) or labels.max() > 9:
        raise ValueError(f"{folder}/{prefix}*: expected labels 0 to 9 for {len(images):,} images, "
                         f"found {len(labels):,} labels up to {labels.max()}; {FETCH_AGAIN}")
    return torch.from_numpy(images[:, None]), torch.from_numpy(labels)


def read_idx(path, shape):
    """The items of an IDX file, or of path.gz, fetched if neither is there: uint8 (N, *shape)."""
    if not path.exists():
        path = path.with_name(path.name + ".gz")
    if not path.exists():
        download([url + path.name for url in MNIST_URLS], path, MNIST_MD5[path.name])
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = np.frombuffer(file.read(8 + 4 * len(shape)), ">u4").tolist()
            content = file.read(60_000 * math.prod(shape) + 1)  # never unpacks more than that
        items = np.frombuffer(content, np.uint8).reshape(-1, *shape).copy()
        if header != [0x0800 + items.ndim, len(items), *shape] or len(items) == 0:  # 08: uint8
            raise ValueError(f"header {header} and {len(items):,} items")
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise ValueError(f"{path}: expected an IDX file of items of shape {shape}, found a damaged "
                         f"one: {problem}; {FETCH_AGAIN}") from None
    return items


def download(urls, path, md5):
    """Download from the first URL whose content has this MD5 checksum. Raises ConnectionError."""
    temporary = path.with_name(path.name + ".part")
    reasons = []
    for url in urls:
        print(f"downloading {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                content = response.read()
            if (found := hashlib.md5(content).hexdigest()) != md5:
                raise ValueError(f"its MD5 should be {md5} and is {found}")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)  # only a complete file gets this name
            return
        except Exception as problem:  # whatever went wrong, the next address may work
            reasons.append(f"{url}: {problem}")
        finally:
            temporary.unlink(missing_ok=True)
    raise ConnectionError(f"cannot fetch {path.name} ({'; '.join(reasons)}); put the files into "
                          f"{path.parent}/ yourself, or use --data leaves or --data glyphs")


def make_leaves(count, seed):
    """Dead leaves: random discs painted over each other, radii with density r^-3, 3 to 40 pixels.

    Returns (images uint8 (count, 3, 32, 32), labels, all 0), a function of count and seed.
    """
    rng = np.random.default_rng(seed)
    discs = 35_592  # 5 times the area of the canvas
    tiles = []
    for _ in range(0, count, 1024):  # a canvas of 1024 x 1024 pixels is cut into 1024 images
        u = rng.random((discs, 1))  # radius: the inverse of its distribution function at u
        radius = (3**-2 - u * (3**-2 - 40**-2)) ** -0.5
        centre = rng.random((discs, 2)) * (1024 + 2 * 40) - 40
        colour = rng.normal(122, 55, (discs, 1)) + rng.normal(0, 22, (discs, 3))
        canvas = Image.new("RGB", (2048, 2048), (122, 122, 122))  # twice the size: smooth edges
        draw = ImageDraw.Draw(canvas)
        boxes = np.concatenate([2 * (centre - radius), 2 * (centre + radius)], axis=1)
        for box, fill in zip(boxes.tolist(), colour.clip(0, 255).astype(int).tolist()):
            draw.ellipse(box, fill=tuple(fill))
        pixels = torch.from_numpy(np.array(canvas.reduce(2)))  # (1024, 1024, 3)
        tiles.append(pixels.unfold(0, 32, 32).unfold(1, 32, 32).flatten(0, 1))  # (1024, 3, 32, 32)
    return torch.cat(tiles)[:count].contiguous(), torch.zeros(count, dtype=torch.uint8)


def make_glyphs(count, seed):
    """Digits of Pillow's font of random size, stroke, place and rotation.

    Returns (images uint8 (count, 1, 28, 28), labels uint8 0 to 9), a function of count and seed.
    """
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size) for size in range(20, 31)]
    images = np.empty((count, 1, 28, 28), np.uint8)
    labels = rng.integers(0, 10, count, np.uint8)
    for image, label in zip(images, labels):
        digit = Image.new("L", (28, 28))
        centre = 14 + rng.uniform(-2.5, 2.5, 2)
        ImageDraw.Draw(digit).text(centre, str(label), 255, fonts[rng.integers(11)], anchor="mm",
                                   stroke_width=rng.integers(3) / 2)
        image[0] = digit.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
    return torch.from_numpy(images), torch.from_numpy(labels)


def open_picture(path):
    """A Pillow image, upright. Raises ValueError for a file that is no picture, damaged or huge."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them at 255
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype("u1"))
        return image
    except Exception as problem:  # Pillow's readers of damaged files raise all kinds of things
        reason = str(problem) or type(problem).__name__
        raise ValueError(f"cannot use {path} as a picture: {reason}") from None


def square_picture(image, channels, side):
    """The middle square of a Pillow image, resized: uint8 (channels, side, side)."""
    image = image.convert("RGB" if channels == 3 else "L")
    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).view(side, side, channels).permute(2, 0, 1)


def load_folder(folder, train, channels, side):
    """Every picture below a folder. The 10% with the lowest hashes of their names are the test set.

    Returns (images uint8 (N, channels, side, side), labels, all 0). Raises ValueError if
    there are fewer than 20.
    """
    paths, pictures = [path for path in Path(folder).rglob("*") if path.is_file()], {}
    for path in paths:
        name = path.relative_to(folder).as_posix().encode(errors="surrogateescape")
        with contextlib.suppress(ValueError):
            pictures[zlib.crc32(name), name] = square_picture(open_picture(path), channels, side)
    count = len(pictures)
    if count < len(paths):
        print(f"notice: {folder}: {len(paths) - count:,} of {len(paths):,} files are not pictures")
    if count < 20:
        raise ValueError(f"{folder} holds {count} pictures that can be read; 20 are needed")
    images = torch.stack([pictures[key] for key in sorted(pictures)])
    images = images[count // 10:] if train else images[:count // 10]
    return images, torch.zeros(len(images), dtype=torch.uint8)


BUILT_IN = {"leaves": (make_leaves, 20_480, 1_024), "glyphs": (make_glyphs, 20_000, 2_000)}


def load_dataset(name, root, train, real="cifar10"):
    """Images and labels of "cifar10", "mnist", "leaves", "glyphs", "auto" or a folder of pictures.

    real: "cifar10" or "mnist": what "auto" tries before a built-in set, and whose image size the
    pictures of a folder get. Returns (name of what was loaded, images uint8 (N, C, H, W), labels
    uint8 (N,)). Raises ValueError for another name, and what the loaders raise.
    """
    if name == "auto":
        try:
            return load_dataset(real, root, train)
        except ConnectionError as problem:
            name = "leaves" if real == "cifar10" else "glyphs"
            print(f"*** NO {real.upper()}: {problem}\n*** USING THE BUILT-IN SET '{name}' INSTEAD: "
                  f"figures are not {real} figures (--data {real} makes this an error)")
    if name in BUILT_IN:
        make, train_count, test_count = BUILT_IN[name]
        return name, *(make(train_count, seed=1) if train else make(test_count, seed=2))
    if name in ("cifar10", "mnist"):
        return name, *(load_cifar10 if name == "cifar10" else load_mnist)(root, train)
    if Path(name).is_dir():
        return name, *load_folder(name, train, *((3, 32) if real == "cifar10" else (1, 28)))
    raise ValueError(f"--data must be auto, cifar10, mnist, leaves, glyphs or a folder, not {name}")


def fixed_order(seed, indices, num_pixels):
    """Uniform float32 (B, num_pixels), fixed by seed and image index; indices: int64 (B,)."""
    rows = [np.random.default_rng((seed, index)).random(num_pixels) for index in indices.tolist()]
    return torch.from_numpy(np.stack(rows)).to(indices.device, torch.float32)


def sparse_split(images, input_ratio=0.2, output_ratio=0.2, generator=None, order=None):
    """Choose input and output pixels of each image at random, no pixel twice.

    images: (B, C, H, W), uint8 (mapped to [-1, 1]) or float (taken as they are). A ratio takes
    int(H * W * ratio) pixels; output_ratio None takes all that are not input. order: (B, H * W), or
    None to draw it with `generator`; the lowest are the input, the next the output.
    Returns a dict: full_image (B, C, H, W), input_coords (B, N_in, 2), input_values (B, N_in, C),
    input_indices (B, N_in), the same for the output. A coordinate is (x, y) = (column, row) /
    (side - 1), an index row * W + column. Raises ValueError for ratios of no or too many pixels.
    """
    batch, channels, height, width = images.shape
    pixels = height * width
    n_in = int(pixels * input_ratio) if 0 < input_ratio < 1 else 0
    n_out = pixels - n_in
    if output_ratio is not None:
        n_out = int(pixels * output_ratio) if 0 < output_ratio < 1 else 0
    if n_in < 1 or n_out < 1 or n_in + n_out > pixels:
        raise ValueError(f"ratios {input_ratio} and {output_ratio} must each take a pixel "
                         f"and together at most {pixels}")
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
        split[f"{name}_values"] = values.take_along_dim(indices[:, :, None], dim=1)
    return split


def off_grid_split(images, input_ratio=0.2, output_ratio=0.2, generator=None, order=None):
    """Like sparse_split, but the input lies at random places, not on the pixel grid.

    The input's values are read bilinearly from the image at coordinates uniform in [0, 1]^2;
    input_indices are the nearest pixels. The output are pixels of the grid, None: all of them.
    order: (B, H * W + 2 N_in), uniform in [0, 1]: first the order of the pixels, then the places.
    """
    batch, channels, height, width = images.shape
    pixels = height * width
    n_in = int(pixels * input_ratio)
    if order is None:
        order = torch.rand(batch, pixels + 2 * n_in, generator=generator, device=images.device)
    places = order[:, pixels:].unflatten(1, (n_in, 2))
    split = sparse_split(images, input_ratio, None, order=order[:, :pixels])
    indices = torch.cat([split["output_indices"], split["input_indices"]], dim=1)
    if output_ratio is not None:
        indices = indices[:, :int(pixels * output_ratio)]
    grid = 2 * places[:, :, None] - 1                                      # (B, N_in, 1, 2)
    read = F.grid_sample(split["full_image"], grid, align_corners=True)    # (B, C, N_in, 1)
    column, row = (places * torch.tensor([width - 1, height - 1]).to(places)).round().long().unbind(-1)
    values = split["full_image"].flatten(2).transpose(1, 2)
    x, y = indices % width / max(width - 1, 1), indices // width / max(height - 1, 1)
    return dict(full_image=split["full_image"], input_coords=places, input_values=read[..., 0].mT,
                input_indices=row * width + column, output_indices=indices,
                output_coords=torch.stack([x, y], dim=-1),
                output_values=values.take_along_dim(indices[:, :, None], dim=1))


def heat(error, limit=0.5):
    """Absolute error (C, H, W) as colours (3, H, W): black 0, red, yellow, white from `limit`."""
    level = 3 * (error.abs().mean(0) / limit).clamp(0, 1)
    return torch.stack([level.clamp(0, 1), (level - 1).clamp(0, 1), (level - 2).clamp(0, 1)])


def image_grid(rows, column_labels=(), row_labels=(), captions=None, zoom=4):
    """A Pillow image of rows, lists of images (C, H, W) of one size, C = 1 or 3, in [0, 1].

    captions: a list of strings for each row, written below the images. zoom: size of a pixel.
    """
    height, width = (zoom * n for n in rows[0][0].shape[1:])
    font = ImageFont.load_default(size=13)
    left = 12 + int(max(map(font.getlength, row_labels), default=0))
    top, step_x = 24 if column_labels else 6, width + 6
    step_y = height + (24 if captions else 6)
    grid = Image.new("RGB", (left + step_x * max(map(len, rows)), top + step_y * len(rows)), "#fff")
    draw = ImageDraw.Draw(grid)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            pixels = (image.clamp(0, 1) * 255).round().byte().cpu().expand(3, -1, -1)
            tile = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            x, y = left + j * step_x, top + i * step_y
            grid.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
            if captions:
                draw.text((x + width / 2, y + height + 2), captions[i][j], "#444", font, "ma")
    for j, label in enumerate(column_labels):
        draw.text((left + j * step_x + width / 2, 5), label, "black", font, "ma")
    for i, label in enumerate(row_labels):
        draw.text((6, top + i * step_y + height / 2), label, "black", font, "lm")
    return grid


def run(main):
    """Call main(). An expected error ends in one line and exit code 1, Ctrl-C in 130."""
    try:
        main()
    except (ValueError, OSError, torch.linalg.LinAlgError) as problem:
        sys.exit(f"error: {problem}")
    except RuntimeError as problem:  # of a GPU or of the CPU
        if "allocate" not in str(problem):
            raise
        sys.exit("error: out of memory: use a smaller --batch-size, --samples or --scale")
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="auto", help="cifar10, mnist, leaves, glyphs or a folder")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets lie")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks")
    args = parser.parse_args()
    name, images, _ = load_dataset(args.data, args.data_dir, train=False)
    torch.manual_seed(args.seed % 2**32)
    split = sparse_split(images[:8])
    image, rows = split["full_image"], [split["full_image"]]
    for part in ("input", "output"):
        mask = torch.zeros_like(image[:, 0]).flatten(1).scatter(1, split[f"{part}_indices"], 1.0)
        rows.append(image * mask.view_as(image[:, :1]))  # grey, 0, elsewhere
    rows = [list(x / 2 + 0.5) for x in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    image_grid(rows, row_labels=["image", "input", "output"]).save(args.out / "data.png")
    print(f"{name}: {len(images):,} test images {tuple(images.shape[1:])}; see {args.out}/data.png")


def line_chart(title, curves):
    """A 460 x 320 Pillow image. curves: {label: (xs, ys)}, finite numbers."""
    all_x, all_y = (sum((list(curve[i]) for curve in curves.values()), []) for i in (0, 1))
    x_low, x_span = min(all_x), (max(all_x) - min(all_x)) or 1
    y_low, y_span = min(all_y), (max(all_y) - min(all_y)) or 1
    image = Image.new("RGB", (460, 320), "white")
    draw = ImageDraw.Draw(image)
    draw.text((62, 8), title, "black", font_size=12)
    for part in (0, 0.25, 0.5, 0.75, 1):  # grid lines and numbers on the axes
        x, y = 62 + 374 * part, 290 - 260 * part
        draw.line([(62, y), (436, y)], fill="#e4e4e4")
        number = round(float(y_low + part * y_span), 9)
        draw.text((56, y), f"{number:.3g}", "#444", font_size=12, anchor="rm")
        draw.text((x, 296), f"{x_low + part * x_span:.4g}", "#444", font_size=12, anchor="ma")
    for i, (label, curve) in enumerate(curves.items()):
        colour = ("#1f6fb4", "#d1481f", "#2b9348", "#8a4fbf")[i % 4]
        points = [(62 + 374 * (x - x_low) / x_span, 290 - 260 * (y - y_low) / y_span)
                  for x, y in zip(*curve)]
        draw.line(points, fill=colour, width=2, joint="curve")
        draw.circle(points[-1], 3, colour)
        draw.text((436 - 110 * i, 8), label, colour, font_size=12, anchor="ra")
    return image


if __name__ == "__main__":
    run(main)
