"""Use a trained neural field: sample from it, compare it with classical methods, draw it.

    python sample.py                                  # newest checkpoint below out/, or shipped
    python sample.py --image photo.jpg                # restore a photograph from 20% of its pixels
    python sample.py --image damaged.png --mask mask.png      # white pixels of the mask: missing
    python sample.py --image photo.jpg --size 32 --gif        # its middle square, 32 x 32
    python sample.py out/nf/checkpoint.pt --evaluate  # 1,000 test images: MSE, MAE, PSNR, SSIM
    python sample.py --sampler ddim --steps 20 --eta 1        # --sampler ddpm takes all timesteps
    python sample.py --full --scale 4                 # all missing pixels in a sample; a fine grid
    python sample.py --evaluate 20 --samples 32       # are the samples calibrated?

Two answers are shown. The one-step mean is the prediction at t = T - 1 from pure noise, an
estimate of E[x_0 | x_in]: the lowest squared error, and blurry where the input is ambiguous. A
sample is denoised step by step: a plausible image, whose squared error is about twice that of the
mean. An autoencoder's checkpoint is measured by report_autoencoder of autoencoder.py.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported
import argparse
import io
import json
import math
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from autoencoder import DenoisingAutoencoder, report_autoencoder
from data import (fixed_order, heat, image_grid, load_dataset, load_picture, off_grid_split,
                  open_picture, run, save_pictures, sparse_split, square_picture, to_signed,
                  to_unit)
from nf_denoiser import (GaussianField, NFDenoiser, ddim_sample, ddpm_sample,
                         exponential_covariance, one_step_mean)
from noise import psnr, ssim
from schedule import DiffusionSchedule

SHIPPED = Path(__file__).resolve().parent / "assets" / "nf_medium.pt"
KEYS = ("kind", "config", "settings", "schedule", "data", "step")  # of every checkpoint


# --------------------------------------------------------------- one-step mean, classical methods
def nearest(split):
    """The value of the nearest input pixel, for a sparse_split's outputs: (B, N, C)."""
    index = torch.cdist(split["output_coords"], split["input_coords"]).argmin(2, keepdim=True)
    return split["input_values"].take_along_dim(index, dim=1)


def inverse_distance(split, power=4):
    """Mean of the input pixels weighted by distance^-power (Shepard, 1968): (B, N, C)."""
    distance = torch.cdist(split["output_coords"], split["input_coords"]).clamp(min=1e-6)
    weights = distance**-power
    return weights / weights.sum(dim=2, keepdim=True) @ split["input_values"]


def kriging(split):
    """Mean of a Gaussian field with exponential covariance, given the inputs: (B, N, C)."""
    covariance = exponential_covariance(split["full_image"].shape[-1])
    field = GaussianField(covariance.to(split["full_image"].device))
    mean = split["input_values"].mean(dim=1, keepdim=True)
    _, y_out, _ = field(split["input_coords"], split["input_values"] - mean, split["output_coords"])
    return mean + y_out


# ------------------------------------------------------------------------------------ evaluation
def split_images(images, indices, seed=0, input_ratio=0.2, full=False, pixels="grid"):
    """A sparse_split of images (B, C, H, W) whose outputs are all missing pixels.

    It also has "n_out": the first n_out outputs are sampled and measured, a fifth of the image, or
    all if full. The mask is a function of seed and an image's index, indices (B,).
    """
    total = images[0, 0].numel()
    if pixels == "anywhere":
        order = fixed_order(seed, indices, total + 2 * int(total * input_ratio)).to(images.device)
        split = off_grid_split(images, input_ratio, None, order=order)
    else:
        order = fixed_order(seed, indices, total).to(images.device)
        split = sparse_split(images, input_ratio, None, order=order)
    missing = split["output_indices"].shape[1]
    split["n_out"] = missing if full else min(missing, total // 5)
    return split


def where(split):
    """A split's coordinates and input values, as arguments of the samplers."""
    return {key: split[key] for key in ("output_coords", "input_coords", "input_values")}


def assemble(split, values=None):
    """Images (B, C, H, W) in [-1, 1]: the input pixels of a split, and values (B, N, C) at its
    first N outputs; grey elsewhere."""
    image = torch.zeros_like(split["full_image"]).flatten(2).mT            # (B, H * W, C)
    image = image.scatter(1, split["input_indices"][..., None].expand_as(split["input_values"]),
                          split["input_values"])
    if values is not None:
        indices = split["output_indices"][:, :values.shape[1], None].expand_as(values)
        image = image.scatter(1, indices, values.clamp(-1, 1))
    return image.mT.view_as(split["full_image"])


@torch.no_grad()
def reconstruct(model, schedule, split, sampler=None):
    """Whole images (B, C, H, W) in [-1, 1] by each method, for a split of split_images.

    sampler(model, output_coords=, input_coords=, input_values=) draws the first n_out outputs
    jointly; the others are the one-step mean given the input and the sample. Returns {method:
    images}, without a sample if sampler is None.
    """
    answers = {"one-step mean": one_step_mean(model, schedule, **where(split))}
    if sampler:
        coords, rest = split["output_coords"].tensor_split([split["n_out"]], dim=1)
        sample = sampler(model, **where(split | dict(output_coords=coords))).clamp(-1, 1)
        if rest.shape[1]:
            known = (torch.cat([split["input_coords"], coords], dim=1),
                     torch.cat([split["input_values"], sample], dim=1))
            sample = torch.cat([sample, one_step_mean(model, schedule, rest, *known)], dim=1)
        answers["sample"] = sample
    answers |= {"kriging": kriging(split), "inverse distance": inverse_distance(split),
                "nearest": nearest(split)}
    return {name: assemble(split, values) for name, values in answers.items()}


def evaluate_field(model, schedule, images, sampler=None, seed=0, batch=25, **options):
    """{method: {"mse", "mae", "psnr", "ssim"}} over images uint8 (N, C, H, W), values in [0, 1].

    MSE and MAE are over the measured pixels, PSNR is that of the mean MSE, SSIM is of whole images
    with the input pixels kept. sampler: see reconstruct. options: those of split_images.
    """
    sums = {}
    for indices in torch.arange(len(images)).split(batch):
        split = split_images(images[indices], indices, seed, **options)
        truth = to_unit(split["full_image"])
        places = split["output_indices"][:, None, :split["n_out"]]
        for name, image in reconstruct(model, schedule, split, sampler).items():
            image = to_unit(image)
            error = (image - truth).flatten(2).take_along_dim(places, dim=2).cpu().double()
            each = [error.square().mean(), error.abs().mean(), ssim(image, truth).mean()]
            sums[name] = sums.get(name, 0) + len(indices) * torch.tensor(each)
    means = {name: (total / len(images)).tolist() for name, total in sums.items()}
    return {name: dict(mse=mse, mae=mae, psnr=psnr(mse), ssim=similarity)
            for name, (mse, mae, similarity) in means.items()}


def evaluate_samples(model, schedule, images, sampler, count, seed=0, **options):
    """Are `count` samples of each image calibrated? images: uint8 (N, C, H, W).

    Returns (figures, rows for image_grid). Figures, values in [0, 1]: coverage, the share of true
    values inside the samples' central 90% (of perfect samples 29/33 = 0.88 for a count of 32);
    spread, their mean standard deviation; psnr_mean, the PSNR of their mean. The rows, of the
    first 4 images: two samples, mean, truth, standard deviation, error of the mean.
    """
    sums, rows = torch.zeros(3), []
    for i, image in enumerate(images):
        copies, indices = image.expand(count, -1, -1, -1), torch.full((count,), i)
        split = split_images(copies, indices, seed, **options)
        samples = to_unit(reconstruct(model, schedule, split, sampler)["sample"])
        truth, mean, std = to_unit(split["full_image"][0]), samples.mean(0), samples.std(0)
        rank = ((samples < truth).sum(0) + (samples <= truth).sum(0)) / (2 * count)  # 0 to 1
        inside = ((rank >= 0.05) & (rank <= 0.95)).float()
        figures = torch.stack([inside, std, (mean - truth).square()]).flatten(2)    # (3, C, H * W)
        places = split["output_indices"][0, :split["n_out"]]
        sums += figures[..., places].mean((1, 2)).cpu()
        if i < 4:
            rows.append([*samples[:2], mean, truth, heat(std, 0.25), heat(mean - truth, 0.25)])
    coverage, spread, mse = (sums / len(images)).tolist()
    return dict(coverage=coverage, spread=spread, psnr_mean=psnr(mse)), rows


# -------------------------------------------------------------------------------------- pictures
def draw_field(split, answers):
    """Input pixels, kriging, one-step mean, sample, truth, error of the mean; PSNR below."""
    truth, rows, captions = split["full_image"], [], []
    images = [answers[name] for name in ("kriging", "one-step mean", "sample")]
    for i, given in enumerate(assemble(split)):
        row = [given, *(image[i] for image in images), truth[i]]
        rows.append([*map(to_unit, row), heat((images[1][i] - truth[i]) / 2)])
        mse = [(image[i] - truth[i]).square().mean().item() / 4 for image in images]
        captions.append(["", *(f"{psnr(x):.1f} dB" for x in mse), "", "white: 0.5"])
    labels = ["input pixels", "kriging", "one-step mean", "sample", "truth", "error of mean"]
    return image_grid(rows, labels, captions=captions)


def draw_fine(model, schedule, split, scale):
    """The field on a grid `scale` times as fine, beside the input and the truth (bicubic)."""
    truth = split["full_image"]
    size = [scale * n for n in truth.shape[2:]]
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij")
    coords = torch.stack([x, y], -1).view(1, -1, 2).to(truth).expand(len(truth), -1, -1)
    fine = one_step_mean(model, schedule, **where(split | dict(output_coords=coords)))
    given = F.interpolate(assemble(split), scale_factor=scale)
    smooth = F.interpolate(truth, size=size, mode="bicubic", align_corners=True)
    rows = [[to_unit(x) for x in row] for row in zip(given, fine.mT.unflatten(2, size), smooth)]
    return image_grid(rows, ["input pixels", f"model x{scale}", "truth, bicubic"],
                      zoom=max(1, 6 // scale))


def animate(split, frames, path):
    """A GIF of three images: x_t above, the prediction x_0_hat below, at most 50 of the steps."""
    pictures = []
    for t, *values in [*frames[::max(1, len(frames) // 25)], *[frames[-1]] * 10]:
        rows = [list(to_unit(assemble(split, x)[:3])) for x in values]
        picture = image_grid(rows, [f"t = {t}"], ["x_t", "prediction"], zoom=3)
        pictures.append(picture.quantize(64))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0)
    print(f"animation: {path}")


def report_field(model, schedule, images, folder, name, sampler, args):
    """Print the table of evaluate_field, draw the pictures, return {method: figures}.

    images: uint8 (N, C, H, W). sampler: see reconstruct. args: the flags of this script.
    """
    options = dict(seed=args.seed, input_ratio=args.input_ratio, full=args.full, pixels=args.pixels)
    results, frames = evaluate_field(model, schedule, images, sampler, **options), []
    split = split_images(images[:6], torch.arange(len(images[:6])), **options)
    record = partial(sampler, on_step=lambda *step: frames.append(step))
    pictures = {"samples.png": draw_field(split, reconstruct(model, schedule, split, record))}
    print(f"{name}: {len(images):,} images, {split['input_indices'].shape[1]} pixels given, "
          f"{split['n_out']} measured, sample in {len(frames)} steps, mask seed {args.seed}\n"
          f"{'':18}{'MSE':>10}{'MAE':>10}{'PSNR dB':>10}{'SSIM':>10}")
    for method, row in results.items():
        print(f"{method:18}{row['mse']:10.5f}{row['mae']:10.5f}{row['psnr']:10.2f}"
              f"{row['ssim']:10.4f}")
    if args.samples:
        row, rows = evaluate_samples(model, schedule, images, sampler, args.samples, **options)
        results["samples"] = row
        print(f"{args.samples} samples per image: {row['coverage']:.1%} of the true values in the "
              f"central 90%, standard deviation {row['spread']:.4f}, PSNR of their mean "
              f"{row['psnr_mean']:.2f} dB")
        labels = ["sample 1", "sample 2", "mean", "truth", "std. deviation", "error of mean"]
        pictures["spread.png"] = image_grid(rows, labels, zoom=3)
    if args.scale > 1:
        pictures["scale.png"] = draw_fine(model, schedule, split, args.scale)
    save_pictures(folder, pictures)
    if args.gif:
        animate(split, frames, folder / "denoising.gif")
    return results


# ----------------------------------------------------------------------------------- photographs
@torch.no_grad()
def restore(image, known, answer, side=32):
    """Fill the missing pixels of a picture of any size, in windows that overlap by one half.

    image: (C, H, W) in [-1, 1]. known: bool (H, W), the given pixels. answer(split) -> (B, N, C):
    values for the outputs of a sparse_split of windows, such as kriging. They are clamped to
    [-1, 1] and averaged with the weight sin^2, which falls to 0 towards a window's edge.
    Windows with fewer than a quarter of the given pixels of the best unfinished one wait for a
    later pass, where pixels already restored count as given: holes are filled from their rim.
    Returns (C, H, W); the given pixels are unchanged. Raises ValueError if no pixel is given.
    """
    if not known.any():
        raise ValueError("no pixel of the picture is given: there is nothing to restore it from")
    (channels, height, width), pixels, stride = image.shape, side * side, side // 2
    # k + 1 windows take side + k * stride pixels: the picture is mirrored up to the next such size
    rows, columns = (np.pad(np.arange(n), (0, (side - n) if n < side else (side - n) % stride),
                            "symmetric") for n in (height, width))
    index = torch.from_numpy(rows[:, None] * width + columns).to(image.device)
    windows = index.unfold(0, side, stride).unfold(1, side, stride).reshape(-1, pixels)
    ramp = torch.sin(math.pi * (torch.arange(side, device=image.device) + 0.5) / side) ** 2
    weight = (ramp[:, None] * ramp).flatten()
    image, known = image.flatten(1), known.flatten()
    while not known.all():
        counts = known[windows].sum(1)
        counts[counts == pixels] = 0  # complete: nothing to do
        ready = counts >= max(1, counts.max() / 4)
        total = image.new_zeros(channels + 1, len(known))  # weighted sum, sum of weights
        done = 0
        for count in counts[ready].unique().tolist():
            for some in windows[counts == count].split(16):
                content = image[:, some].transpose(0, 1)                     # (B, C, pixels)
                # given pixels come first in the order, and int(pixels * ratio) is their count
                ratio = (count + 0.5) / pixels
                split = sparse_split(content.unflatten(2, (side, side)), ratio, None,
                                     order=(~known[some]).float())
                values = F.pad(assemble(split, answer(split)).flatten(2), (0, 0, 0, 1), value=1)
                total.index_add_(1, some.flatten(), (values * weight).transpose(0, 1).flatten(1))
                done += len(some)
                if sys.stdout.isatty():
                    print(f"{done:,} of {ready.sum():,} windows", end="\x1b[K\r", flush=True)
        filled = ~known & (total[-1] > 0)
        image = torch.where(filled, total[:-1] / total[-1].clamp(min=1e-12), image)
        known = known | filled
    return image.view(channels, height, width)


def report_picture(model, schedule, image, known, has_truth, folder):
    """Restore a picture, print a table, write restored.png and comparison.png to the folder.

    image, known, has_truth: of load_picture. restored.png is the one-step mean. Returns
    {method: {"psnr"}}, in dB over the missing pixels; {} without has_truth.
    """
    device = schedule.betas.device
    truth, known = to_signed(image.to(device)), known.to(device)
    given, results = truth * known, {}
    print(f"{known.sum():,} of {known.numel():,} pixels given")
    columns, captions = {"given": given}, [f"{known.float().mean():.0%} of the pixels"]
    methods = {"nearest": nearest, "kriging": kriging, "one-step mean": lambda split:
               one_step_mean(model, schedule, **where(split))}
    for name, method in methods.items():
        columns[name] = restore(given, known, method, model.side)
        if has_truth:
            mse = ((columns[name] - truth)[:, ~known] / 2).square().mean().item()
            results[name] = dict(psnr=psnr(mse))
            captions.append(f"{psnr(mse):.2f} dB")
            print(f"{name:18}{captions[-1]:>10}", flush=True)
    columns |= {"truth": truth} if has_truth else {}
    captions += [""] * (len(columns) - len(captions))
    comparison = image_grid([[to_unit(x) for x in columns.values()]], list(columns),
                            captions=[captions], zoom=max(1, 256 // max(known.shape)))
    restored = ((columns["one-step mean"] + 1) * 127.5).round().byte().cpu()
    restored = Image.fromarray(restored.permute(1, 2, 0).expand(-1, -1, 3).numpy())
    if (given == given[:1]).all():
        restored = restored.convert("L")  # grey stays grey
    save_pictures(folder, {"restored.png": restored, "comparison.png": comparison})
    return results


# ----------------------------------------------------------------------------------- checkpoints
def load_checkpoint(path, device="cpu"):
    """A checkpoint of train.py, loaded without running code in it: (model, the whole dict).

    Raises ValueError for a file that is no such checkpoint or damaged, OSError if it cannot be
    read.
    """
    with open(path, "rb") as file:
        try:
            if (damaged := zipfile.ZipFile(file).testzip()) is not None:  # torch.load does not look
                raise ValueError(f"{damaged} is damaged")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            kind, config, *_ = (checkpoint[key] for key in KEYS)
            DiffusionSchedule(**checkpoint["schedule"])  # refuses unknown schedules here
            weights = {name: value.float() for name, value in checkpoint["model"].items()}
            if kind not in ("nf", "dae", "ae"):
                raise ValueError("it holds another kind of model")
            model = (NFDenoiser(weights["alphas_cumprod"], **config) if kind == "nf"
                     else DenoisingAutoencoder(**config))
            model.load_state_dict(weights)
        except Exception as problem:  # a foreign or damaged file can fail in any way
            reason = f"{type(problem).__name__}: {str(problem).strip()}".split("\n")[0][:150]
            raise ValueError(f"{path} is not a checkpoint of this version of train.py "
                             f"({reason})") from None
    return model.to(device).eval(), checkpoint


def save_checkpoint(path, checkpoint):
    """Write a temporary file, then rename it: a kill in between leaves the old file intact.

    Raises OSError if the disk is full; torch.save alone would raise a RuntimeError.
    """
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".part")
    torch.save(checkpoint, buffer)
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def export(model, checkpoint, path):
    """Write the model alone: weights in half precision, one half of the symmetric covariance."""
    weights = checkpoint["model"] | {name: p.detach().half().cpu()
                                     for name, p in model.named_parameters()}
    save_checkpoint(path, {key: checkpoint[key] for key in KEYS} | dict(model=weights))
    print(f"exported: {path}")


def pick_device(name):
    """torch.device(name). Raises ValueError if this machine does not have it."""
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except Exception as problem:  # each kind of device has its own
        reason = str(problem).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None


# ------------------------------------------------------------------------------------------ main
def between(low, high, kind=int):
    """A type for argparse: numbers from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, got {text}")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's message
    return parse


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, help="default: newest below --out; --image: shipped")
    add("--sampler", choices=["ddim", "ddpm"], help="default ddim")
    add("--steps", type=between(1, 1000), help="number of DDIM steps (default 50); DDPM takes all")
    add("--eta", type=between(0, 1, float), default=0.0, help="randomness of DDIM, 0 to 1")
    add("--seed", type=between(0, 2**31 - 1), default=0, help="seed of masks and noise")
    add("--input-ratio", type=between(0.0001, 0.9999, float), default=0.2,
        help="share of the pixels that is given")
    add("--samples", type=between(2, 1000), metavar="K", help="measure the spread of K samples")
    add("--full", action="store_true", help="sample all missing pixels jointly")
    add("--scale", type=between(1, 16), default=1, help="draw on a grid this many times as fine")
    add("--gif", action="store_true", help="animate the denoising")
    add("--image", type=Path, help="restore this picture; missing: --mask, transparent, or random")
    add("--mask", type=Path,
        help="of --image, as large; white: missing (cover a little more than the damage)")
    add("--size", type=between(1, 64), help="reduce --image to the size of the training images, 32")
    add("--evaluate", type=between(1, 10**6), nargs="?", const=1000, default=6, metavar="N",
        help="measure on the first N test images (1,000 if N is left out)")
    add("--export", type=Path, metavar="FILE", help="write the weights alone, in half precision")
    add("--json", type=Path, metavar="FILE", help="write the figures of the table to FILE")
    add("--pixels", choices=["grid", "anywhere"], help="default: what the model was trained on")
    add("--data", help="default: what the model was trained on")
    add("--data-dir", type=Path, default=Path("data"), help="folder of the data sets")
    add("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.sampler == "ddpm" and (args.steps or args.eta):
        parser.error("--steps and --eta are for DDIM; DDPM takes all timesteps")
    if (args.mask or args.size) and not args.image:
        parser.error("--mask and --size are for --image")
    if args.size and args.mask:
        parser.error("--size takes a complete picture: no --mask")
    args.sampling = any([args.sampler, args.steps, args.eta, args.samples, args.full, args.gif,
                         args.scale > 1])
    if args.image and not args.size and args.sampling:
        parser.error("--image draws no samples: add --size 32 to see its middle as they do")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    start = time.time()
    device = pick_device(args.device)
    path = args.checkpoint or SHIPPED
    if not args.checkpoint and not args.image:
        path = max(args.out.rglob("checkpoint.pt"), key=os.path.getmtime, default=SHIPPED)
    if path == SHIPPED and not path.exists():
        raise ValueError(f"no checkpoint below {args.out}: train one with python train.py")
    model, checkpoint = load_checkpoint(path, device)
    kind, config = checkpoint["kind"], checkpoint["config"]
    print(f"{path}: {kind}, {checkpoint['step']:,} steps on {checkpoint['data']}")
    if args.export:
        return export(model, checkpoint, args.export)
    if kind != "nf" and (args.image or args.sampling):
        raise ValueError(f"{path} is an autoencoder, and these flags are for a neural field: give "
                         f"the path of its checkpoint")
    schedule = DiffusionSchedule(**checkpoint["schedule"]).to(device)
    sampler = partial(ddim_sample, num_steps=args.steps or 50, eta=args.eta)
    if args.sampler == "ddpm":
        sampler = ddpm_sample
    sampler = partial(sampler, schedule=schedule,
                      generator=torch.Generator().manual_seed(args.seed))

    folder, name, images = args.out / kind, args.image, [args.image]
    channels, side = config.get("channels", 1), config.get("side", 28)
    if args.image and not args.size:
        problem = load_picture(args.image, channels, args.mask, args.input_ratio, args.seed)
        results = report_picture(model, schedule, *problem, folder)
    else:
        if args.image:
            images = square_picture(open_picture(args.image), channels, args.size)[None]
        else:
            wanted = args.data or ("auto" if path.resolve() == SHIPPED else checkpoint["data"])
            real = "cifar10" if channels == 3 else "mnist"
            name, images, _ = load_dataset(wanted, args.data_dir, train=False, real=real)
        if images.shape[1:] != (channels, side, side):
            raise ValueError(f"{path} takes images of {channels} x {side} x {side}, and those of "
                             f"{name} are {tuple(images.shape[1:])}")
        if kind == "nf":
            args.pixels = args.pixels or checkpoint["settings"].get("pixels", "grid")
            images = images[:args.evaluate].to(device)
            results = report_field(model, schedule, images, folder, name, sampler, args)
        else:
            results = report_autoencoder(model, images.to(device), folder,
                                         checkpoint["settings"]["noise"])
    if args.json:
        figures = dict(checkpoint=str(path), data=str(name), images=len(images), seed=args.seed,
                       methods=results)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"figures: {args.json}")
    print(f"{time.time() - start:.0f} s on {device}")


if __name__ == "__main__":
    run(main)
