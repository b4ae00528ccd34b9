"""Images as tensors: read image files, choose sparse pixels, turn tensors into pictures.

CIFAR-10   32 x 32 colour, 10 classes of photographs        Krizhevsky (2009)
MNIST      28 x 28 grey, handwritten digits                 LeCun et al. (1998)
leaves     32 x 32 colour, made here: overlapping discs     Lee, Mumford & Huang (IJCV 2001)
glyphs     28 x 28 grey, made here: digits of Pillow's font, turned, scaled and shifted
a folder   every picture below it, as 32 x 32 colour or 28 x 28 grey

    python data.py                  # CIFAR-10 (or leaves) as sparse pixels: out/data.png

This file needs only torch, numpy and Pillow: copy it anywhere.
"""
import argparse
import gzip
import hashlib
import math
import os
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps


def load_cifar10(root, train):
    """CIFAR-10, binary version, from root/cifar-10-batches-bin, one folder higher or deeper, or
    from root/cifar-10-binary.tar.gz, which is downloaded if nothing is there.

    Returns (images uint8 (N, 3, 32, 32), labels uint8 (N,)); N is 50,000 or 10,000, with a notice
    if fewer. Raises ConnectionError if a download fails, ValueError for a damaged file."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    records = torch.cat([read_cifar10_records(root, name) for name in names])
    # A record has 3,073 bytes: the label, then all red values, all green, all blue, each plane
    # row by row from the top. That is already the order (channel, row, column) of a tensor.
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def load_mnist(root, train):
    """MNIST from its IDX files, gzipped or not, in root, root/MNIST or root/MNIST/raw; downloaded
    into the last one if they are not there. Returns (images uint8 (N, 1, 28, 28), labels uint8
    (N,)). Raises as load_cifar10 does."""
    prefix = "train" if train else "t10k"
    images = read_idx(root, f"{prefix}-images-idx3-ubyte", (28, 28))
    labels = read_idx(root, f"{prefix}-labels-idx1-ubyte", ())
    if len(images) != len(labels) or labels.max() > 9:
        raise ValueError(f"{root}: {len(images):,} {prefix} images with {len(labels):,} labels up "
                         f"to {labels.max()} are not MNIST: move them away to fetch it")
    return images[:, None], labels


def to_signed(images):
    """The neural field's range, centred on 0: uint8 in 0..255, to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_unit(x):
    """The range of pictures and of the metrics: float in [-1, 1], to [0, 1]."""
    return x / 2 + 0.5


def sparse_split(images, input_ratio=0.2, output_ratio=0.2, generator=None, order=None):
    """Choose input and output pixels of each image at random, no pixel twice.

    images: (B, C, H, W), uint8 (mapped to [-1, 1]) or float (taken as they are). A ratio takes
    int(H * W * ratio) pixels; output_ratio None takes all that are not input. order: (B, H * W),
    numbers to sort: the same ones choose the same pixels; None draws them with `generator`.
    Returns a dict: full_image (B, C, H, W), input_coords (B, N_in, 2), input_values (B, N_in, C),
    input_indices (B, N_in), the same for the output. A coordinate is (x, y) = (column, row) /
    (side - 1), an index row * W + column. Raises ValueError for no or too many pixels."""
    batch, _, height, width = images.shape
    n_in, n_out = count_split(height * width, input_ratio, output_ratio)
    if order is None:
        order = torch.rand(batch, height * width, generator=generator, device=images.device)
    # Sorting random numbers shuffles the pixels of every image at once, without a loop.
    shuffled = order.argsort(dim=1, stable=True)  # (B, H * W)
    chosen = {"input": shuffled[:, :n_in], "output": shuffled[:, n_in:n_in + n_out]}

    full_image = to_signed(images) if images.dtype == torch.uint8 else images
    pixels = full_image.flatten(2).mT  # (B, H * W, C)
    split = {"full_image": full_image}
    for name, indices in chosen.items():
        x = indices % width / max(width - 1, 1)
        y = indices // width / max(height - 1, 1)
        split[f"{name}_indices"] = indices
        split[f"{name}_coords"] = torch.stack([x, y], -1)
        split[f"{name}_values"] = pixels.take_along_dim(indices[:, :, None], 1)
    return split


# ===================== below: downloads, built-in sets, folders, pictures, command line

CIFAR10_URLS = ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
PYTHON_VERSION = {"cifar-10-python.tar.gz", "cifar-10-python", "cifar-10-batches-py",
                  "data_batch_1"}  # files and folders of another edition of CIFAR-10
MNIST_URLS = ["https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/"]
MNIST_MD5 = {"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
             "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
             "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
             "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}
PLACES = ["cifar-10-batches-bin", "MNIST/raw", "MNIST", "raw", ".", "*/cifar-10-batches-bin",
          "*/MNIST/raw"]  # below --data-dir


def download(urls, path, md5):
    """Download from the first URL whose content has this MD5 checksum. Raises ConnectionError."""
    reasons = []
    for url in urls:
        print(f"downloading {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                content = response.read()
            if hashlib.md5(content).hexdigest() != md5:
                raise ValueError(f"its MD5 should be {md5}")
            return write_whole(path, content)
        except Exception as problem:  # whatever went wrong, the next address may work
            reasons.append(f"{url}: {problem}")
    names = sorted(file.name for file in path.parent.glob("*"))
    found = ", ".join(names[:8]) or "nothing"
    if PYTHON_VERSION.intersection(names):
        found += ", which is the Python version of CIFAR-10"
    raise ConnectionError(f"cannot fetch {path.name} ({'; '.join(reasons)}); put this file into "
                          f"{path.parent}/ yourself (found there: {found}) or use --data leaves or "
                          f"--data glyphs")


def write_whole(path, content):
    """Write a file that has its name only when it is complete."""
    temporary = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path):
    """Raises ValueError or OSError, naming it, if write_whole cannot write to this path."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder or a device: rename it, or choose another place")
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.touch()
    temporary.unlink()
    if is_new:  # there may be nothing to write
        path.parent.rmdir()


def find(root, *names):
    """The first file that has one of these names, patterns for glob, in a usual place, or None."""
    for place in PLACES:
        for name in names:
            for path in sorted(Path(root).glob(f"{place}/{name}")):
                if path.is_file():
                    return path


def read_cifar10_records(root, name):
    """The records of a file of CIFAR-10, uint8 (N, 3073), fetched if it is not there."""
    path = find(root, name)
    if not path:
        archive = Path(root, "cifar-10-binary.tar.gz")
        path = Path(root, "cifar-10-batches-bin", name)
        if not archive.exists():
            download(CIFAR10_URLS, archive, CIFAR10_MD5)
        if hashlib.md5(archive.read_bytes()).hexdigest() != CIFAR10_MD5:
            raise ValueError(f"{archive} is damaged or another archive: move it away to fetch it")
        with tarfile.open(archive) as tar:
            for member in tar:  # all files in one pass
                place = path.with_name(Path(member.name).name)
                if place.suffix == ".bin" and not place.exists():
                    write_whole(place, tar.extractfile(member).read())
    content = np.fromfile(path, np.uint8, count=30_730_001)  # one byte too many is enough
    count, rest = divmod(len(content), 3073)
    if count == 0 or rest or content[::3073].max() > 9:
        raise ValueError(f"{path}: expected 10,000 records of 3,073 bytes, the first 0 to 9, not "
                         f"these {len(content):,} bytes; delete it to fetch it again")
    if count < 10_000:
        print(f"notice: {path.name} holds {count:,} of 10,000 images")
    return torch.from_numpy(content.reshape(count, 3073))


def read_idx(root, name, shape):
    """The items of a file of MNIST, uint8 (N, *shape); it is downloaded if it is not there.

    An IDX file starts with big-endian 32-bit numbers: 0x0800 (the values are uint8) plus the number
    of dimensions, then the size of each one. The values follow, the last dimension fastest. Raises
    ValueError if the header is not that of (N, *shape) with N > 0."""
    stem = name.replace("-idx", "[-.]idx")
    path = find(root, f"{stem}/{stem}", stem, f"{stem}.gz")  # some programs unpack x.gz to x/x
    if not path:
        path = Path(root, "MNIST/raw", f"{name}.gz")
        download([url + path.name for url in MNIST_URLS], path, MNIST_MD5[path.name])
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":  # whatever its name says
            content = gzip.decompress(content)
        header = np.frombuffer(content, ">u4", 2 + len(shape)).tolist()
        items = np.frombuffer(content, np.uint8, offset=4 * len(header)).reshape(-1, *shape)
        if header != [0x0800 + items.ndim, len(items), *shape] or len(items) == 0:
            raise ValueError(f"header {header} for {len(items):,} items")
        return torch.tensor(items)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise ValueError(f"{path}: expected the IDX format, items of shape {shape}, found "
                         f"{problem}; if it is damaged, delete it to fetch it again") from None


def fixed_order(seed, indices, num_pixels):
    """Random numbers for sparse_split, float32 (B, num_pixels), functions of the seed and indices,
    int64 (B,), alone: image 7 has the same mask in every batch, run and process."""
    rows = []
    for index in indices.tolist():
        rows.append(np.random.default_rng((seed, index)).random(num_pixels))
    return torch.from_numpy(np.stack(rows)).to(indices.device, torch.float32)


def off_grid_split(images, input_ratio=0.2, output_ratio=0.2, generator=None, order=None):
    """Like sparse_split, but the input lies at random places, not on the pixel grid: its values are
    read bilinearly, input_indices are the nearest pixels. Output are pixels of the grid, for
    output_ratio None all of them. order: uniform in [0, 1], (B, H * W + 2 N_in): random numbers for
    the pixels, then the coordinates."""
    batch, _, height, width = images.shape
    pixels = height * width
    n_in, _ = count_split(pixels, input_ratio, output_ratio)
    if order is None:
        order = torch.rand(batch, pixels + 2 * n_in, generator=generator, device=images.device)
    split = sparse_split(images, input_ratio, output_ratio, order=order[:, :pixels])
    if output_ratio is None:
        for key in ("indices", "coords", "values"):
            both = split[f"output_{key}"], split[f"input_{key}"]
            split[f"output_{key}"] = torch.cat(both, dim=1)
    coords = order[:, pixels:].unflatten(1, (n_in, 2))
    image = split["full_image"]
    grid = (2 * coords[:, :, None] - 1).to(image)                          # (B, N_in, 1, 2)
    values = F.grid_sample(image, grid, align_corners=True)                # (B, C, N_in, 1)
    last = coords.new_tensor([width - 1, height - 1])
    column, row = (coords * last).round().long().unbind(-1)
    split["input_indices"] = row * width + column
    split["input_coords"], split["input_values"] = coords, values[..., 0].mT
    return split


def put_pixels(image, indices, values):
    """Images like `image` (B, C, H, W), with values (B, N, C) at the pixels of indices (B, N)."""
    values = values.mT                                                     # (B, C, N)
    indices = indices[:, None].expand_as(values)
    return image.flatten(2).scatter(2, indices, values).view_as(image)


def count_split(num_pixels, input_ratio, output_ratio):
    """How many pixels sparse_split takes, (n_in, n_out). Raises ValueError."""
    n_in = int(num_pixels * input_ratio) if 0 < input_ratio < 1 else 0
    n_out = num_pixels - n_in
    if output_ratio is not None:
        n_out = int(num_pixels * output_ratio) if 0 < output_ratio < 1 else 0
    if 0 in (n_in, n_out) or n_in + n_out > num_pixels:
        raise ValueError(f"ratios {input_ratio} and {output_ratio} must each take a pixel "
                         f"and together at most {num_pixels}")
    return n_in, n_out


def make_leaves(count, seed):
    """Dead leaves: random discs painted over each other, radii with density r^-3, 3 to 40 pixels.
    Returns (images uint8 (count, 3, 32, 32), labels uint8, all 0)."""
    rng = np.random.default_rng(seed)
    discs = 35_592  # 5 times the area of the canvas
    images = []
    for _ in range(0, count, 1024):  # a canvas of 1024 x 1024 pixels is cut into 1024 images
        u = rng.random((discs, 1))  # radius: the inverse of its distribution function at u
        radius = (3**-2 - u * (3**-2 - 40**-2)) ** -0.5
        centre = rng.uniform(-40, 1024 + 40, (discs, 2))
        grey = rng.normal(122, 55, (discs, 1))
        colour = rng.normal(grey, 22, (discs, 3))
        colour = colour.clip(0, 255).astype(int)
        canvas = Image.new("RGB", (2048, 2048), "#7a7a7a")  # twice the size: smooth edges
        draw = ImageDraw.Draw(canvas)
        for xy, r, fill in zip(2 * centre, 2 * radius, colour.tolist()):
            draw.circle(xy, r.item(), tuple(fill))
        picture = to_tensor(canvas.reduce(2))
        tiles = picture.unfold(1, 32, 32).unfold(2, 32, 32)
        images.append(tiles.flatten(1, 2).transpose(0, 1))  # of (3, 32, 32, 32, 32)
    return torch.cat(images)[:count], torch.zeros(count, dtype=torch.uint8)


def make_glyphs(count, seed):
    """Digits of Pillow's font of random size, stroke, place and rotation.
    Returns (images uint8 (count, 1, 28, 28), labels uint8 (count,) from 0 to 9)."""
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size) for size in range(20, 31)]
    labels = rng.integers(0, 10, count, np.uint8)
    images = []
    for label in labels:
        digit = Image.new("L", (28, 28))
        centre = 14 + rng.uniform(-2.5, 2.5, 2)
        font = fonts[rng.integers(11)]
        ImageDraw.Draw(digit).text(centre, str(label), 255, font, anchor="mm",
                                   stroke_width=rng.integers(3) / 2)
        images.append(to_tensor(digit.rotate(rng.uniform(-20, 20), Image.BICUBIC)))
    return torch.stack(images), torch.from_numpy(labels)


BUILT_IN = {"leaves": (make_leaves, 20_480, 1_024), "glyphs": (make_glyphs, 20_000, 2_000)}
MODES = {1: "L", 3: "RGB"}  # Pillow's names for the numbers of channels


def load_dataset(name, root, train, real="cifar10"):
    """Images and labels of "cifar10", "mnist", "leaves", "glyphs", "auto" or a folder of pictures.
    real: "cifar10" or "mnist": what "auto" tries before a built-in set, and whose image size the
    pictures of a folder get. Returns (name of what was loaded, images uint8 (N, C, H, W), labels
    (N,), whole numbers from 0 on). Raises ValueError for another name, and what the loaders raise.
    """
    if name == "auto":
        try:
            return load_dataset(real, root, train)
        except ConnectionError as problem:
            name = "leaves" if real == "cifar10" else "glyphs"
            print(f"*** NO {real.upper()}: {problem}\n*** USING THE BUILT-IN SET '{name}' INSTEAD: "
                  f"figures are not {real} figures (--data {real} makes this an error)")
    if name == "cifar10":
        return name, *load_cifar10(root, train)
    if name == "mnist":
        return name, *load_mnist(root, train)
    if name in BUILT_IN:
        make, train_count, test_count = BUILT_IN[name]
        return name, *(make(train_count, seed=1) if train else make(test_count, seed=2))
    if Path(name).is_dir():
        channels, side = (3, 32) if real == "cifar10" else (1, 28)
        return name, *load_folder(name, train, channels, side)
    raise ValueError(f"--data must be auto, cifar10, mnist, leaves, glyphs or a folder, not {name}")


def load_folder(folder, train, channels, side):
    """Every picture below a folder. The 10% with the lowest hashes of their names are the test set.
    Returns (images uint8 (N, channels, side, side), labels int64 (N,), the numbers of the
    subfolders in alphabetical order, without any all 0). Raises ValueError below 20."""
    def place(name):
        return zlib.crc32(os.fsencode(name)), name

    pictures, subfolders = [], []
    names = sorted(files_below(folder), key=place)
    for name in names:
        with suppress(ValueError):
            picture = open_picture(Path(folder, name), 2 * side)
            pictures.append(square_picture(picture, channels, side))
            subfolders.append(os.path.dirname(name).split("/")[0])
    count = len(pictures)
    if count < len(names) and not train:  # once: every program loads the test images
        print(f"notice: {folder}: {len(names) - count:,} of {len(names):,} files are not pictures")
    if count < 20:
        raise ValueError(f"{folder} holds {count} pictures that can be read; 20 are needed")
    part = slice(count // 10, None) if train else slice(count // 10)
    _, labels = np.unique(subfolders, return_inverse=True)
    return torch.stack(pictures[part]), torch.from_numpy(labels[part])


def files_below(folder):
    """The files below a folder, relative to it. Links are followed, to each folder once."""
    names, seen = [], set()
    for place, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort()
        real = os.path.realpath(place)
        if real in seen:  # links may lead in circles
            subfolders.clear()
            continue
        seen.add(real)
        paths = [Path(place, file) for file in files]
        names += [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return names


def open_picture(path, least_side=None):
    """A Pillow image, RGBA and upright; its info holds what a result should keep of the file.
    least_side: JPEG files are reduced while they are read, but not below it; no notices. Raises
    ValueError for a file that is damaged, huge or no picture, or if it is unknown what is white."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        # opened here, since Pillow maps a TIFF file into memory by its name, and turns it wrongly
        with open(path, "rb") as stream, Image.open(stream) as file:
            if math.prod(file.size) > 300_000_000:
                raise ValueError("it has more than 300 megapixels: reduce it first")
            # 16 bits: Pillow says so in the mode or in its name for the file's layout, not for PPM
            layout = f"{file.format} {file.mode} {file.tile}"
            deep = ";16" in layout or layout.startswith("PPM I ")
            frames = getattr(file, "n_frames", 1)
            if least_side:
                file.draft(None, (least_side, least_side))
            ImageOps.exif_transpose(file, in_place=True)
            picture = to_rgba(file, deep)
            tables = getattr(file, "quantization", {})  # of JPEG; first the step of a block's mean
            picture.jpeg_step = max((table[0] for table in tables.values()), default=0)
    except Exception as problem:  # Pillow's readers of damaged files raise all kinds of things
        reason = str(problem) or type(problem).__name__
        raise ValueError(f"cannot use {path} as a picture: {reason}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    if deep and not least_side:
        brightest = picture.convert("L").getextrema()[1]
        print(f"notice: {path}: 16 bits become 8, of which the brightest is {brightest} of 255")
    if frames > 1 and file.format != "MPO" and not least_side:  # MPO: previews of one photograph
        print(f"notice: {path} has {frames} frames or pages: the first one is taken")
    return picture


def to_rgba(file, deep):
    """A Pillow image of mode RGBA; its info has the keywords icc_profile and dpi for save."""
    is_grey = Image.getmodebase(file.mode) == "L"
    declared = file.info.get("transparency")
    picture = file
    if deep and is_grey:  # Pillow would clip them at 255
        bits = getattr(file, "tag_v2", {}).get(258, [16])[0]  # TIFF's BitsPerSample, 12 or 16
        levels = np.asarray(file)
        # rounded up: what is not black stays so, the ones of a mask too
        grey = np.ceil(levels * (255 / (2**bits - 1)))
        alpha = 255 * (levels != declared)
        picture = Image.fromarray(np.dstack([grey, alpha]).astype(np.uint8))
    elif deep and declared:  # of 16 bits a channel Pillow keeps the upper 8
        file.info["transparency"] = tuple(level // 256 for level in declared)
    elif file.mode in ("I", "F"):
        raise ValueError("it does not say which number is white: save it with 8 or 16 bits")
    picture = picture.convert("RGBA")
    picture.info = {}
    profile = file.info.get("icc_profile") or b""
    if profile[16:20] == (b"GRAY" if is_grey else b"RGB "):  # not of CMYK, which is RGB now
        picture.info["icc_profile"] = profile
    dpi = tuple(map(float, file.info.get("dpi", [0])))
    if 1 < min(dpi) <= max(dpi) < 1e5:  # 1 is what TIFF files without a resolution have
        picture.info["dpi"] = dpi
    return picture


def square_picture(picture, channels, side):
    """The middle square of an RGBA image, over white, resized: uint8 (channels, side, side)."""
    small = ImageOps.fit(picture, (side, side), Image.LANCZOS)
    white = Image.new("RGBA", small.size, "white")
    return to_tensor(Image.alpha_composite(white, small).convert(MODES[channels]))


def to_picture(image):
    """A Pillow image, RGB, of a tensor (C, H, W) in [0, 1], C = 1 or 3."""
    levels = (image.clamp(0, 1) * 255).round().byte()
    pixels = levels.expand(3, -1, -1).permute(1, 2, 0)  # Pillow has the channels last
    return Image.fromarray(pixels.cpu().numpy())


def to_tensor(picture):
    """uint8 (C, H, W) of a Pillow image of mode L, RGB or RGBA."""
    pixels = np.atleast_3d(np.array(picture))  # (H, W, C)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_picture(path, channels, mask=None, input_ratio=0.2, seed=0):
    """A picture with missing pixels: (image uint8 (C, H, W), input_mask bool (H, W), has_truth,
    info), where info holds keywords for Pillow's save: icc_profile and dpi of the file.

    Missing are transparent pixels (alpha below 128) and those that the picture `mask` marks, of a
    complete picture (has_truth) all but input_ratio, drawn with `seed`. Raises ValueError for
    files that cannot be used."""
    picture = open_picture(path)
    if mask:
        picture.paste((0, 0, 0, 0), mask=read_mask(mask, picture.size))
    input_mask = to_tensor(picture)[3] >= 128
    has_truth = bool(input_mask.all())
    if has_truth:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(input_mask.numel(), generator=generator)
        input_mask = (order < int(input_ratio * len(order))).view_as(input_mask)
    return to_tensor(picture.convert(MODES[channels])), input_mask, has_truth, picture.info


def read_mask(path, size):
    """What a mask marks, 255 in a Pillow image of mode L: levels of 16 or more, so that soft edges
    count; of two levels the higher one. Transparent pixels have the level 0, but in a photograph
    with holes they are what is marked. Raises ValueError if nothing is, and for another size."""
    picture = open_picture(path)
    if picture.size != size:
        raise ValueError(f"{path} must have the same size as the picture: it has {picture.size}, "
                         f"not {size}")
    grey, alpha = picture.convert("LA").split()
    levels = ImageChops.multiply(grey, alpha)
    shades = sorted(grey.histogram(alpha))
    has_holes = alpha.getextrema()[0] < 128
    if has_holes and sum(shades[-2:]) < sum(shades) / 2:
        print(f"notice: {path} is a photograph: its transparent pixels are taken as missing")
        levels = ImageChops.invert(alpha)
    highest = levels.getextrema()[1]
    # measured: beside an edge, the noise of a JPEG file stays below 7 quantization steps
    threshold = max(16, min(highest // 2, highest * picture.jpeg_step // 36))
    if len(levels.getcolors()) == 2:
        threshold = highest
    if highest < threshold:
        raise ValueError(f"no pixel is missing: {path} has levels up to {highest} of 255, and "
                         f"only {threshold} or more marks a pixel as missing")
    return levels.point(lambda level: 255 * (level >= threshold))


def save_pictures(folder, pictures, **options):
    """Save {file name: Pillow image} below a folder, all or none, and say where. options: for
    Pillow's save; a colour profile decides whether a picture is saved in grey."""
    folder.mkdir(parents=True, exist_ok=True)
    space = options.get("icc_profile", b"")[16:20]
    mode = {b"GRAY": "L", b"RGB ": "RGB"}.get(space)  # None: as it is
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for name, picture in pictures.items():
            if (folder / name).is_dir():
                raise ValueError(f"{folder / name} is a folder: rename it")
            picture.convert(mode).save(Path(temporary, name), **options)
        for name in pictures:
            Path(temporary, name).replace(folder / name)
    for name in pictures:
        print(f"picture: {folder / name}")


def image_grid(rows, column_labels=(), row_labels=(), captions=None, zoom=4):
    """A Pillow image of rows, lists of images (C, H, W) of one size, C = 1 or 3, in [0, 1].
    captions: a list of strings for each row, written below the images. zoom: size of a pixel."""
    height, width = (zoom * size for size in rows[0][0].shape[1:])
    font = ImageFont.load_default(13)
    left = 12 + int(max(map(font.getlength, row_labels), default=0))
    top = 24 if column_labels else 6
    step_x = width + 6
    step_y = height + (24 if captions else 6)
    size = left + step_x * max(map(len, rows)), top + step_y * len(rows)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            x = left + j * step_x
            y = top + i * step_y
            tile = to_picture(image).resize((width, height), Image.NEAREST)
            grid.paste(tile, (x, y))
            if captions:
                draw.text((x + width / 2, y + height + 2), captions[i][j], "#444", font, "ma")
    for j, label in enumerate(column_labels):
        draw.text((left + j * step_x + width / 2, 5), label, "black", font, "ma")
    for i, label in enumerate(row_labels):
        draw.text((6, top + i * step_y + height / 2), label, "black", font, "lm")
    return grid


def heat(error, limit=0.5):
    """Absolute error (C, H, W) as colours (3, H, W): black 0, red, yellow, white from `limit`."""
    level = 3 * error.abs().mean(0) / limit
    return torch.stack([level, level - 1, level - 2]).clamp(0, 1)


def line_chart(title, curves):
    """A 460 x 320 Pillow image. curves: {label: (xs, ys)}, finite numbers, four curves at most."""
    image = Image.new("RGB", (460, 320), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(12)
    draw.text((62, 8), title, "black")
    all_xs, all_ys = zip(*curves.values())
    all_xs, x_labels = axis(all_xs, 62, 436)
    all_ys, y_labels = axis(all_ys, 290, 30)  # rows are counted from the top
    for x, label in x_labels.items():
        draw.text((x, 296), label, "#444", anchor="ma")
    for y, label in y_labels.items():
        draw.line([62, y, 436, y], "#e4e4e4")
        draw.text((56, y), label, "#444", anchor="rm")
    for i, (label, xs, ys) in enumerate(zip(curves, all_xs, all_ys)):
        colour = ("#1f6fb4", "#d1481f", "#2b9348", "#8a4fbf")[i]
        points = list(zip(xs, ys))
        draw.line(points, colour, width=2, joint="curve")
        draw.circle(points[-1], 3, colour)
        draw.text((436 - 110 * i, 8), label, colour, anchor="ra")
    return image


def axis(lists, start, end):
    """An axis from the pixel `start` to `end` for lists of values: where these lie, lists again,
    and {place: label} of five evenly spaced numbers, with the decimals of a hundredth of it."""
    values = np.concatenate(lists)
    low, span = values.min(), np.ptp(values) or 1.0
    numbers = np.linspace(low, low + span, 5)
    places = np.linspace(start, end, 5)
    decimals = max(0, 2 - math.floor(math.log10(span)))
    labels = [f"{number:z.{decimals}f}" for number in numbers]  # z: 0, not -0
    return [np.interp(xs, numbers, places) for xs in lists], dict(zip(places, labels))


def make_parser(doc, default_data=None):
    """An argparse parser with --out. default_data: if given, also with --data and --data-dir, and
    this is what the help says about the default of --data."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    if default_data:
        add("--data", default="auto",
            help=f"auto, cifar10, mnist, leaves, glyphs or a folder; default: {default_data}")
        add("--data-dir", type=Path, default=Path("data"), help="folder of the data sets")
    return parser


def between(low, high, kind=int):
    """A type for argparse: numbers from low to high."""
    def number(text):  # its name stands in argparse's message
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, got {text}")
        return kind(text)
    return number


class Output:
    """Standard output that may be missing, closed, or of any encoding: printing never fails."""

    closed = False  # in a notebook a second program finds the first one's

    def __init__(self, stream):
        if stream is None or stream.closed:
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a question mark for what it cannot show
        self.stream, self.isatty = stream, stream.isatty

    def write(self, text):
        with suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        """Nothing to do: write has flushed."""


def run(main):
    """Call main(). An expected error ends in one line and exit code 1, Ctrl-C in 130."""
    if sys.version_info < (3, 11):
        sys.exit(f"error: Python 3.11 or later is needed, and this is {sys.version.split()[0]}")
    sys.stdout = Output(sys.stdout)
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
    args = make_parser(__doc__, default_data="auto").parse_args()
    name, images, _ = load_dataset(args.data, args.data_dir, train=False)
    print(f"{name}: {len(images):,} test images {tuple(images.shape[1:])}")
    torch.manual_seed(0)
    split = sparse_split(images[:8])
    rows = [list(to_unit(split["full_image"]))]
    grey = torch.zeros_like(split["full_image"])
    for part in ("input", "output"):
        sparse = put_pixels(grey, split[f"{part}_indices"], split[f"{part}_values"])
        rows.append(list(to_unit(sparse)))
    grid = image_grid(rows, row_labels=["image", "input", "output"])
    save_pictures(args.out, {"data.png": grid})


if __name__ == "__main__":
    run(main)
