"""Use a trained neural field: sample from it, measure it beside classical methods, draw it.

    python sample.py                                  # newest checkpoint below out/, or shipped
    python sample.py --image photo.jpg                # restore a photograph from 20% of its pixels
    python sample.py --image damaged.png --mask mask.png      # white pixels of the mask: missing
    python sample.py --image small.png --upscale 2
    python sample.py out/nf/checkpoint.pt --evaluate  # 1,000 test images: MSE, MAE, PSNR, SSIM
    python sample.py --sampler ddim --steps 20 --eta 1        # --sampler ddpm takes all timesteps
    python sample.py --full --gif                     # all missing pixels as one sample; animation
    python sample.py --scale 4                        # the field on a grid four times as fine
    python sample.py --evaluate 20 --samples 32       # are the samples calibrated?

Two answers are shown. The one-step mean is the prediction at t = T - 1 from pure noise, an
estimate of E[x_0 | x_in]: the lowest squared error, and blurry where the input is ambiguous. A
sample is denoised step by step: a plausible image, whose squared error is about twice that of the
mean. An autoencoder's checkpoint is measured by report_autoencoder of autoencoder.py.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported
import argparse
import functools
import json
import math
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageOps

from autoencoder import DenoisingAutoencoder, report_autoencoder
from data import (fixed_order, heat, image_grid, load_dataset, open_picture, scatter_pixels,
                  sparse_split)
from nf_denoiser import GaussianField, NFDenoiser, exponential_covariance
from schedule import DiffusionSchedule

SHIPPED = Path(__file__).resolve().parent / "assets" / "nf_medium.pt"


# -------------------------------------------------------------------------------------- samplers


@torch.no_grad()
def ddim_sample(model, schedule, output_coords, input_coords, input_values, num_steps=50, eta=0.0,
                generator=None, on_step=None):
    """Denoise Gaussian noise at output_coords step by step. DDIM (Song et al., 2021), eq. 12.

    model(x_t, output_coords, t, input_coords, input_values) -> x_0_hat. output_coords
    (B, N_out, 2), input_coords (B, N_in, 2), input_values (B, N_in, C) in [-1, 1]. eta: 0 is
    deterministic given the first noise, 1 as random as DDPM. on_step(t, x_t, x_0_hat) is called
    before each step. Returns (B, N_out, C), not clamped. Raises ValueError for num_steps outside
    1..T or eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    timesteps = schedule.timesteps(num_steps).tolist()
    x_t = randn(output_coords, input_values, generator)
    for t, t_next in zip(timesteps, [*timesteps[1:], -1]):
        t_batch = torch.full((len(x_t),), t, device=x_t.device)
        x_0 = model(x_t, output_coords, t_batch, input_coords, input_values)
        if on_step:
            on_step(t, x_t, x_0)
        noise = randn(output_coords, input_values, generator)
        x_t = schedule.ddim_step(x_t, x_0, t, t_next, eta, noise)
    return x_t


@torch.no_grad()
def ddpm_sample(model, schedule, output_coords, input_coords, input_values, generator=None,
                on_step=None):
    """Ancestral sampling over all T timesteps. DDPM (Ho et al., 2020), algorithm 2.

    Arguments and result as in ddim_sample.
    """
    x_t = randn(output_coords, input_values, generator)
    for t in reversed(range(schedule.num_timesteps)):
        t_batch = torch.full((len(x_t),), t, device=x_t.device)
        x_0 = model(x_t, output_coords, t_batch, input_coords, input_values)
        if on_step:
            on_step(t, x_t, x_0)
        x_t = schedule.ddpm_step(x_t, x_0, t, randn(output_coords, input_values, generator))
    return x_t


@torch.no_grad()
def one_step_mean(model, schedule, output_coords, input_coords, input_values, generator=None):
    """The estimate of E[x_0 | x_in]: the prediction at t = T - 1 from pure noise, (B, N_out, C).

    It is the mean of two, for the pixels as they are and for their mirror image: + 0.04 dB.
    """
    x_t = randn(output_coords, input_values, generator)
    t = torch.full((len(x_t),), schedule.num_timesteps - 1, device=x_t.device)
    mirror = lambda coords: torch.stack([1 - coords[..., 0], coords[..., 1]], dim=-1)
    x_0 = model(x_t, output_coords, t, input_coords, input_values, pure_noise=True)
    mirrored = model(x_t, mirror(output_coords), t, mirror(input_coords), input_values,
                     pure_noise=True)
    return (x_0 + mirrored) / 2


def randn(coords, values, generator):
    """N(0, 1) for each of coords (B, N, 2) and channel of values (B, M, C): (B, N, C)."""
    device = generator.device if generator else values.device
    shape = *coords.shape[:2], values.shape[2]
    return torch.randn(shape, generator=generator, device=device).to(values)


# -------------------------------------------------------------------- classical methods, metrics


def nearest(split):
    """The value of the nearest input pixel, for a sparse_split's outputs: (B, N, C)."""
    index = torch.cdist(split["output_coords"], split["input_coords"]).argmin(2, keepdim=True)
    return split["input_values"].gather(1, index.expand(-1, -1, split["input_values"].shape[2]))


def inverse_distance(split, power=4):
    """Mean of the input pixels weighted by distance^-power (Shepard, 1968): (B, N, C)."""
    distance = torch.cdist(split["output_coords"], split["input_coords"]).clamp(min=1e-6)
    weights = distance**-power
    return weights / weights.sum(dim=2, keepdim=True) @ split["input_values"]


def kriging(split):
    """Mean of a Gaussian field with exponential covariance, given the inputs: (B, N, C)."""
    field = exponential_field(split["full_image"].shape[-1], split["input_values"].device)
    image, _ = field(split["input_indices"], split["input_values"])
    return image.mT.gather(1, split["output_indices"][..., None].expand(-1, -1, image.shape[1]))


@functools.cache
def exponential_field(side, device):
    return GaussianField(exponential_covariance(side)).to(device)


def psnr(mse):
    """Peak signal-to-noise ratio in dB, -10 log10(mse), of values in [0, 1]; infinite for 0."""
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(a, b):
    """Structural similarity of images (B, C, H, W) in [0, 1]: (B,). Wang et al. (2004), eq. 13.

    Gaussian window of 11 x 11, sigma 1.5, where it fits; mean over places and channels.
    Raises ValueError for images below 11 x 11 or of different shapes.
    """
    if a.shape != b.shape or min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs two batches of one shape, at least 11 x 11; got "
                         f"{tuple(a.shape)} and {tuple(b.shape)}")
    batch = len(a)
    # on the CPU in float64, because a variance is a small difference of large numbers
    a, b = (x.flatten(0, 1)[:, None].cpu().double() for x in (a, b))
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = window[:, None] * window / window.sum() ** 2
    blur = lambda x: F.conv2d(x, window[None, None])
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
             / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return score.view(batch, -1).mean(1)


# ------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def reconstruct(model, schedule, images, order, input_ratio=0.2, full=False, sampler="ddim",
                num_steps=50, eta=0.0, generator=None, on_step=None):
    """Every method's values for the missing pixels of images (B, C, H, W), masks from `order`.

    Returns (split, n_out, answers): the sparse_split whose outputs are all missing pixels; how
    many of them, from the first, are measured (a fifth of the image; all if full); and
    {method: (B, N, C)}. The sample is drawn jointly for those n_out pixels; the others are the
    one-step mean given the input and the sample.
    """
    split = sparse_split(images, input_ratio, None, order=order)
    missing = split["output_indices"].shape[1]
    n_out = missing if full else min(missing, images[0, 0].numel() // 5)
    output_coords, *given = where(split)
    coords, rest = output_coords.split([n_out, missing - n_out], dim=1)
    if sampler == "ddim":
        sample = ddim_sample(model, schedule, coords, *given, num_steps, eta, generator, on_step)
    else:
        sample = ddpm_sample(model, schedule, coords, *given, generator, on_step)
    if rest.shape[1]:
        known = torch.cat([given[0], coords], 1), torch.cat([given[1], sample.clamp(-1, 1)], 1)
        sample = torch.cat([sample, one_step_mean(model, schedule, rest, *known, generator)], 1)
    answers = {
        "one-step mean": one_step_mean(model, schedule, output_coords, *given, generator),
        "sample": sample,
        "kriging": kriging(split),
        "inverse distance": inverse_distance(split),
        "nearest": nearest(split),
    }
    return split, n_out, answers


def evaluate_field(model, schedule, images, seed=0, batch=100, **options):
    """{method: {"mse", "mae", "psnr", "ssim"}} over images uint8 (N, C, H, W), values in [0, 1].

    The mask of image i is a function of (seed, i). MSE and MAE are over the measured pixels,
    clamped; PSNR is that of the mean MSE; SSIM is of whole images with the input pixels kept.
    options: those of reconstruct.
    """
    generator, sums = torch.Generator().manual_seed(seed), {}
    for start in range(0, len(images), batch):
        part = images[start:start + batch]
        order = mask_order(seed, range(start, start + len(part)), images)
        split, n_out, answers = reconstruct(model, schedule, part, order, generator=generator,
                                            **options)
        for name, values in answers.items():
            error = (values.clamp(-1, 1) - split["output_values"])[:, :n_out] / 2
            similarity = ssim(assemble(split, values) / 2 + 0.5, split["full_image"] / 2 + 0.5)
            each = torch.stack([error.square().mean(), error.abs().mean(),
                                similarity.mean().to(error)])
            sums[name] = sums.get(name, 0) + each.double().cpu() * len(part)
    means = {name: (total / len(images)).tolist() for name, total in sums.items()}
    return {name: dict(mse=mse, mae=mae, psnr=psnr(mse), ssim=similarity)
            for name, (mse, mae, similarity) in means.items()}


@torch.no_grad()
def one_step_psnr(model, schedule, images, seed=0):
    """PSNR in dB of the one-step mean and of kriging on images uint8 (N, C, H, W), 20% given."""
    split = sparse_split(images, order=mask_order(seed, range(len(images)), images))
    training = model.training
    model.eval()
    mean = one_step_mean(model, schedule, *where(split), torch.Generator().manual_seed(seed))
    model.train(training)
    return tuple(psnr(((values.clamp(-1, 1) - split["output_values"]) / 2).square().mean().item())
                 for values in (mean, kriging(split)))


def evaluate_samples(model, schedule, images, count, seed=0, input_ratio=0.2, num_steps=50,
                     eta=0.0):
    """Are `count` DDIM samples of each image calibrated? images: uint8 (N, C, H, W).

    Returns coverage, the share of true values inside the samples' central 90% (of perfect
    samples 29/33 = 0.88 for a count of 32), spread, their mean standard deviation, and
    psnr_mean, the PSNR of their mean; values in [0, 1].
    """
    generator, sums = torch.Generator().manual_seed(seed), torch.zeros(3)
    for i, image in enumerate(images):
        output_ratio = min(0.2, 1 - input_ratio)
        split = sparse_split(image[None], input_ratio, output_ratio,
                             order=mask_order(seed, [i], images))
        copies = [x.expand(count, -1, -1) for x in where(split)]
        x = ddim_sample(model, schedule, *copies, num_steps, eta, generator).clamp(-1, 1) / 2
        truth = split["output_values"][0] / 2                                # (N_out, C)
        rank = ((x < truth).sum(0) + (x <= truth).sum(0)) / (2 * count)      # 0 to 1
        inside = ((rank >= 0.05) & (rank <= 0.95)).float().mean()
        sums += torch.stack([inside, x.std(0).mean(), (x.mean(0) - truth).square().mean()]).cpu()
    coverage, spread, mse = (sums / len(images)).tolist()
    return dict(coverage=coverage, spread=spread, psnr_mean=psnr(mse))


def mask_order(seed, indices, images):
    """fixed_order for the images with these indices, on the device of images (N, C, H, W)."""
    return fixed_order(seed, torch.tensor(indices), images[0, 0].numel()).to(images.device)


def where(split):
    """A split's (output_coords, input_coords, input_values), as the samplers take them."""
    return split["output_coords"], split["input_coords"], split["input_values"]


def given_pixels(split, background=0.0):
    """Images (B, C, H, W) of the input pixels on a background, a number or images."""
    shape = split["full_image"].shape
    return scatter_pixels(split["input_indices"], split["input_values"], shape, background)


def assemble(split, values):
    """Whole images (B, C, H, W) in [-1, 1]: the input pixels, and values (B, N, C) elsewhere."""
    shape = split["full_image"].shape
    rest = scatter_pixels(split["output_indices"], values.clamp(-1, 1), shape)
    return given_pixels(split, rest)


# -------------------------------------------------------------------------------------- pictures


def draw_field(split, answers):
    """Input pixels, kriging, one-step mean, sample, truth, error of the mean; PSNR below."""
    truth, given = split["full_image"], given_pixels(split)
    images = [assemble(split, answers[name]) for name in ("kriging", "one-step mean", "sample")]
    rows, captions = [], []
    for i, x in enumerate(truth):
        row = [given[i], *(image[i] for image in images), x]
        rows.append([*(y / 2 + 0.5 for y in row), heat((images[1][i] - x) / 2)])
        each = (psnr((image[i] - x).square().mean().item() / 4) for image in images)
        captions.append(["", *(f"{value:.1f} dB" for value in each), "", "white: 0.5"])
    labels = ["input pixels", "kriging", "one-step mean", "sample", "truth", "error of mean"]
    return image_grid(rows, labels, captions=captions)


def draw_spread(model, schedule, images, order, generator, count, **options):
    """Two whole-image samples; mean of `count` of them, truth, deviation, error of the mean."""
    rows = []
    for image, one in zip(images, order):
        split, _, answers = reconstruct(model, schedule, image.expand(count, -1, -1, -1),
                                        one.expand(count, -1), full=True, generator=generator,
                                        **options)
        many, truth = assemble(split, answers["sample"]) / 2 + 0.5, image.float() / 255
        rows.append([*many[:2], many.mean(0), truth, heat(many.std(0), 0.25),
                     heat(many.mean(0) - truth, 0.25)])
    labels = ["sample 1", "sample 2", "mean", "truth", "std. deviation", "error of mean"]
    return image_grid(rows, labels, zoom=3)


def draw_fine(model, schedule, split, scale, generator):
    """The field on a grid `scale` times as fine, beside the input and the truth (bicubic)."""
    truth = split["full_image"]
    height, width = (scale * n for n in truth.shape[2:])
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    coords = torch.stack([x, y], -1).view(1, -1, 2).to(truth).expand(len(truth), -1, -1)
    parts = [one_step_mean(model, schedule, part, *where(split)[1:], generator)
             for part in coords.split(16_384, dim=1)]
    fine = torch.cat(parts, dim=1).mT.unflatten(-1, (height, width))
    given = F.interpolate(given_pixels(split), scale_factor=scale)
    smooth = F.interpolate(truth, size=(height, width), mode="bicubic", align_corners=True)
    rows = [[x / 2 + 0.5 for x in row] for row in zip(given, fine, smooth)]
    return image_grid(rows, ["input pixels", f"field x{scale}", "truth, bicubic"],
                      zoom=max(1, 6 // scale))


def animate(split, n_out, frames, path):
    """A GIF of three images: x_t above, the prediction x_0_hat below, a frame for each step."""
    given, places, pictures = given_pixels(split), split["output_indices"][:, :n_out], []
    for t, x_t, x_0 in [*frames[::max(1, len(frames) // 25)], *[frames[-1]] * 10]:
        rows = [list(scatter_pixels(places, x.clamp(-1, 1), given.shape, given)[:3] / 2 + 0.5)
                for x in (x_t, x_0)]
        picture = image_grid(rows, [f"t = {t}"], ["x_t", "prediction"], zoom=3)
        pictures.append(picture.quantize(64))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0)


def report_field(model, schedule, images, folder, name, seed=0, samples=None, scale=1, gif=False,
                 **options):
    """Print the table of evaluate_field, draw the pictures, return {method: figures}.

    images: uint8 (N, C, H, W). samples, scale, gif: as the flags. options: those of reconstruct.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results, few, frames = evaluate_field(model, schedule, images, seed, **options), images[:6], []
    order = mask_order(seed, range(len(few)), images)
    generator = torch.Generator().manual_seed(seed)
    split, n_out, answers = reconstruct(model, schedule, few, order, generator=generator,
                                        on_step=lambda *step: frames.append(step), **options)
    print(f"{name}: {len(images):,} images, {split['input_indices'].shape[1]} pixels given, "
          f"{n_out} measured, sample in {len(frames)} steps, mask seed {seed}\n"
          f"{'':18}{'MSE':>10}{'MAE':>10}{'PSNR dB':>10}{'SSIM':>10}")
    for method, row in results.items():
        print(f"{method:18}{row['mse']:10.5f}{row['mae']:10.5f}{row['psnr']:10.2f}"
              f"{row['ssim']:10.4f}")
    pictures = {"samples.png": draw_field(split, answers)}
    if samples:
        options = {name: options[name] for name in ("input_ratio", "num_steps", "eta")}
        row = results["samples"] = evaluate_samples(model, schedule, images, samples, seed,
                                                    **options)
        print(f"{samples} samples per image: {row['coverage']:.1%} of the true values in the "
              f"central 90%, standard deviation {row['spread']:.4f}, PSNR of their mean "
              f"{row['psnr_mean']:.2f} dB")
        pictures["spread.png"] = draw_spread(model, schedule, few[:4], order, generator,
                                             min(16, samples), **options)
    if scale > 1:
        pictures["scale.png"] = draw_fine(model, schedule, split, scale, generator)
    save_pictures(folder, pictures)
    if gif:
        animate(split, n_out, frames, folder / "denoising.gif")
        print(f"animation: {folder / 'denoising.gif'}")
    return results


# ----------------------------------------------------------------------------------- photographs


@torch.no_grad()
def restore(image, known, answer, side=32):
    """Fill the missing pixels of a picture of any size, in windows that overlap by one half.

    image: (C, H, W) in [-1, 1]. known: bool (H, W), the given pixels. answer(split) -> (B, N, C):
    values for the outputs of a sparse_split of windows, such as kriging. They are clamped to
    [-1, 1] and averaged with the weight sin^2, which falls to 0 towards a window's edge.
    A window waits if it has few given pixels, less than a quarter of those of the best unfinished
    window; then what the others restored counts as given. So a hole is filled from its rim.
    Returns (C, H, W); the given pixels are unchanged. Raises ValueError if no pixel is given.
    """
    if not known.any():
        raise ValueError("no pixel of the picture is given: there is nothing to restore it from")
    (channels, height, width), pixels, stride = image.shape, side * side, side // 2
    # k + 1 windows take side + k * stride pixels: the picture is mirrored up to the next such size
    rows, columns = (np.pad(np.arange(n), (0, (side - n) if n < side else (side - n) % stride),
                            "symmetric") for n in (height, width))
    image, known = image[:, rows][:, :, columns], known[rows][:, columns]
    ramp = torch.sin(math.pi * (torch.arange(side, device=image.device) + 0.5) / side) ** 2
    weight = (ramp[:, None] * ramp).flatten()
    while not known.all():
        cut = lambda x: F.unfold(x[None], side, stride=stride)[0].view(len(x), pixels, -1)
        windows = cut(image).permute(2, 0, 1).unflatten(2, (side, side))     # (L, C, side, side)
        missing = 1 - cut(known[None].float())[0].T                          # (L, pixels)
        counts = pixels - missing.sum(1)
        counts[counts == pixels] = 0  # complete: nothing to do
        ready = counts >= max(1, counts.max() / 4)
        blend, done, shown = image.new_zeros(len(windows), channels + 1, pixels), 0, time.time()
        for count in counts[ready].unique().tolist():
            for index in (counts == count).nonzero()[:, 0].split(16):
                # the order 0 of given pixels makes them the input
                split = sparse_split(windows[index], (count + 0.5) / pixels, None,
                                     order=missing[index])
                blend[index, :channels] = assemble(split, answer(split)).flatten(2) * weight
                blend[index, channels] = weight
                done += len(index)
                if time.time() - shown > 5:
                    shown = time.time()
                    print(f"{done:,} of {ready.sum():,} windows", flush=True)
        blend = F.fold(blend.flatten(1).T[None], known.shape, side, stride=stride)[0]
        filled = ~known & (blend[-1] > 0)
        image = torch.where(filled, blend[:-1] / blend[-1].clamp(min=1e-12), image)
        known = known | filled
    return image[:, :height, :width]


def picture_problem(path, channels, mask=None, input_ratio=0.2, upscale=1, seed=0):
    """A picture with missing pixels: (image uint8 (C, H, W), known bool (H, W), has_truth).

    Missing are transparent pixels (alpha below 128) and the white ones (128 or more) of the
    picture `mask`; of a complete picture (has_truth) all but input_ratio, drawn with `seed`.
    upscale: the picture's pixels are every second (third, ...) one of a larger picture, and the
    others are missing. A longest side above 1,024 is reduced, with a notice. Pixels have 8 bits.
    Raises ValueError for files that cannot be used and if nothing is missing.
    """
    picture = open_picture(path).convert("RGBA")
    missing = ImageOps.invert(picture.getchannel("A"))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if mask:
        white = open_picture(mask).convert("L")
        if white.size != picture.size:
            raise ValueError(f"{mask} has {white.width} x {white.height} pixels and {path} "
                             f"{picture.width} x {picture.height}: they must have the same size")
        missing = ImageChops.lighter(missing, white)
    has_truth = missing.getextrema()[1] < 128 and not mask and upscale == 1
    if upscale * max(picture.size) > 1024:
        if upscale > 1:
            raise ValueError(f"--upscale {upscale} takes pictures of at most {1024 // upscale} "
                             f"pixels a side, and {path} has {max(picture.size)}")
        print(f"notice: {path} is reduced to 1024 pixels on its longest side")
        # next to missing pixels an average would be wrong: take the nearest pixel
        how = Image.Resampling.LANCZOS if has_truth else Image.Resampling.NEAREST
        picture.thumbnail((1024, 1024), how)
        missing.thumbnail((1024, 1024), Image.Resampling.NEAREST)
    width, height = (upscale * n for n in picture.size)
    image = torch.zeros(channels, height, width, dtype=torch.uint8)
    pixels = torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1)
    image[:, ::upscale, ::upscale] = pixels
    known = torch.zeros(height, width, dtype=torch.bool)
    known[::upscale, ::upscale] = torch.from_numpy(np.array(missing) < 128)
    if has_truth:
        order = torch.randperm(known.numel(), generator=torch.Generator().manual_seed(seed))
        known = (order < int(input_ratio * known.numel())).view(height, width)
    if known.all():
        raise ValueError(f"{path}: no pixel is missing, there is nothing to restore")
    return image, known, has_truth


@torch.no_grad()
def sample_picture(model, schedule, given, known, num_steps, eta, generator):
    """A DDIM sample (C, H, W) in [-1, 1] of a picture; the given pixels are kept.

    All windows share x_t, and restore blends their predictions of x_0 before each step.
    """
    draw = lambda: torch.randn(given.shape, generator=generator).to(given)
    x_t, timesteps = draw(), schedule.timesteps(num_steps).tolist()
    for i, (t, t_next) in enumerate(zip(timesteps, [*timesteps[1:], -1]), 1):
        def x_0_hat(split):
            t_batch = torch.full((len(split["full_image"]),), t, device=given.device)
            output_coords, *inputs = where(split)
            return model(split["output_values"], output_coords, t_batch, *inputs)

        x_0 = restore(torch.where(known, given, x_t), known, x_0_hat, model.side)
        x_t = schedule.ddim_step(x_t, x_0, t, t_next, eta, draw())
        print(f"step {i} of {num_steps}", flush=True)
    return torch.where(known, given, x_t.clamp(-1, 1))


def report_picture(model, schedule, image, known, has_truth, folder, sampler=None, seed=0,
                   num_steps=50, eta=0.0):
    """Restore a picture, print a table, write restored.png and comparison.png to the folder.

    image, known, has_truth: of picture_problem. restored.png is the one-step mean, or a sample if
    sampler is "ddim". Returns {method: {"psnr"}}, over the missing pixels; psnr is None if
    has_truth is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device, generator = schedule.betas.device, torch.Generator().manual_seed(seed)
    truth, known = image.to(device).float() / 127.5 - 1, known.to(device)
    given = truth * known
    print(f"{known.sum():,} of {known.numel():,} pixels given")
    answers = {"nearest": nearest, "kriging": kriging, "one-step mean":
               lambda split: one_step_mean(model, schedule, *where(split), generator)}
    results, row, captions = {}, [given], [f"{known.float().mean():.0%} of the pixels"]
    for name in [*answers, *(["sample"] if sampler else [])]:
        start = time.time()
        if name == "sample":
            x = sample_picture(model, schedule, given, known, num_steps, eta, generator)
        else:
            x = restore(given, known, answers[name], model.side)
        mse = ((x - truth)[:, ~known] / 2).square().mean().item()
        results[name] = dict(psnr=psnr(mse) if has_truth else None)
        captions.append(f"{psnr(mse):.2f} dB" if has_truth else "")
        row.append(x)
        print(f"{name:18}{captions[-1]:>10}{time.time() - start:8.1f} s", flush=True)
    known = known.cpu()
    restored = torch.where(known, image, ((x + 1) * 127.5).round().byte().cpu())
    grey = bool((image == image[:1])[:, known].all())
    restored = Image.fromarray(restored.permute(1, 2, 0).expand(-1, -1, 3).numpy())
    labels = ["given", *results]
    if has_truth:
        row.append(truth)
        captions.append("")
        labels.append("truth")
    comparison = image_grid([[x / 2 + 0.5 for x in row]], labels, captions=[captions],
                            zoom=max(1, 256 // max(known.shape)))
    save_pictures(folder, {"restored.png": restored.convert("L") if grey else restored,
                           "comparison.png": comparison})
    return results


def save_pictures(folder, pictures):
    """Save {file name: Pillow image} below a folder, all or none, and say where."""
    for name, picture in pictures.items():
        picture.save(folder / f".{name}")
    for name in pictures:
        (folder / f".{name}").replace(folder / name)
        print(f"picture: {folder / name}")


# ----------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path, device="cpu"):
    """A checkpoint of train.py, loaded without running code in it: (model, the whole dict).

    Raises ValueError for a file that is no such checkpoint or damaged, OSError if it cannot be
    read.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch.load does not compare the checksums
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"{damaged} is damaged")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            weights, config = checkpoint["model"], checkpoint["config"]
            weights = {name: value.float() for name, value in weights.items()}
            covariance = weights.get("field.covariance")
            if covariance is not None and covariance.dim() == 1:  # an upper triangle, of --export
                pixels = config["side"] ** 2
                square = covariance.new_zeros(pixels, pixels)
                square[*torch.triu_indices(pixels, pixels)] = covariance
                weights["field.covariance"] = square + square.triu(1).T
            if missing := {"step", "data", "schedule"} - checkpoint.keys():
                raise ValueError(f"it lacks {', '.join(missing)}")
            if checkpoint["kind"] not in ("nf", "dae", "ae"):
                raise ValueError("it holds another kind of model")
            is_field = checkpoint["kind"] == "nf"
            model = (NFDenoiser(weights["alphas_cumprod"], **config) if is_field
                     else DenoisingAutoencoder(**config))
            model.load_state_dict(weights)
        except Exception as problem:  # another or a damaged file can fail in any way
            reason = f"{type(problem).__name__}: {str(problem).strip()}".split("\n")[0][:150]
            raise ValueError(f"{path} is not a checkpoint of this version of train.py "
                             f"({reason})") from None
    return model.to(device).eval(), checkpoint


def save_checkpoint(path, checkpoint):
    """Write a temporary file, flush it to the disk, rename it: a crash spares the old one."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as problem:  # torch.save's error for a full disk
        raise OSError(f"cannot write {path}: {str(problem).splitlines()[0]}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, figures):
    """Write nested dictionaries of figures as JSON, with null for an infinite PSNR."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = json.loads(json.dumps(figures), parse_constant=lambda _: None)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def pick_device(name):
    """torch.device(name). Raises ValueError if this machine does not have it."""
    try:
        probe = torch.zeros(1, device=name)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None


# ------------------------------------------------------------------------------------------ main


def between(low, high, kind=int):
    """A type for argparse: numbers from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, got {text}")
        return kind(text)
    return parse


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, help="default: newest below --out; --image: shipped")
    add("--sampler", choices=["ddim", "ddpm"], help="default ddim; of --image the one-step mean")
    add("--steps", type=between(1, 10**6), help="of DDIM (default 50); DDPM takes all timesteps")
    add("--eta", type=between(0, 1, float), default=0.0, help="randomness of DDIM, 0 to 1")
    add("--seed", type=between(0, 2**31 - 1), default=0, help="of the masks and the noise")
    add("--input-ratio", type=between(0.0001, 0.9999, float), default=0.2,
        help="share of the pixels that is given")
    add("--samples", type=between(2, 1000), metavar="K", help="measure the spread of K samples")
    add("--full", action="store_true", help="sample all missing pixels jointly")
    add("--scale", type=between(1, 16), default=1, help="query a grid this many times as fine")
    add("--image", type=Path, help="restore this picture; missing: --mask, transparent or random")
    add("--mask", type=Path, help="of --image, a picture of its size; white: missing")
    add("--upscale", type=between(1, 8), default=1, metavar="N", help="enlarge --image N times")
    add("--gif", action="store_true", help="animate the denoising")
    add("--evaluate", type=between(1, 10**6), nargs="?", const=1000, default=6, metavar="N",
        help="measure on the first N test images (1,000 if N is left out)")
    add("--export", type=Path, metavar="FILE", help="write the weights alone, in half precision")
    add("--json", type=Path, metavar="FILE", help="write the figures of the table to FILE")
    add("--data", help="default: what the model was trained on")
    add("--data-dir", type=Path, default=Path("data"), help="where data sets are")
    add("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.sampler == "ddpm" and (args.steps or args.samples or args.eta):
        parser.error("--steps, --samples and --eta are for DDIM; DDPM takes all timesteps")
    if (args.mask or args.upscale > 1) and not args.image:
        parser.error("--mask and --upscale are for --image")
    if args.image and (args.sampler == "ddpm" or args.samples or args.full or args.gif
                       or args.scale > 1):
        parser.error("--image does not go with --sampler ddpm, --samples, --full, --gif, --scale")
    if args.image and not args.sampler and (args.steps or args.eta):
        parser.error("--steps and --eta with --image need --sampler ddim")
    return args


def main():
    args, start = parse_arguments(), time.time()
    device, path = pick_device(args.device), args.checkpoint
    if args.image and path is None:
        path = SHIPPED
    if path is None:
        found = sorted(args.out.rglob("checkpoint.pt"), key=lambda file: file.stat().st_mtime)
        path = found[-1] if found else SHIPPED
        if not path.exists():
            raise ValueError(f"no checkpoint below {args.out}: train one with python train.py")
    model, checkpoint = load_checkpoint(path, device)
    kind = checkpoint["kind"]
    print(f"{path}: {kind}, {checkpoint['step']:,} steps on {checkpoint['data']}")
    if args.export:
        args.export.parent.mkdir(parents=True, exist_ok=True)
        small = {key: checkpoint[key] for key in ("kind", "config", "schedule", "data", "step")}
        half = {name: p.detach().half().cpu() for name, p in model.named_parameters()}
        weights = checkpoint["model"] | half
        covariance = weights.get("field.covariance")
        if covariance is not None and covariance.dim() == 2:  # symmetric: one half is enough
            weights["field.covariance"] = covariance[*torch.triu_indices(*covariance.shape)]
        save_checkpoint(args.export, small | dict(model=weights))
        print(f"exported: {args.export}")

    folder, channels, side = args.out / kind, 1, 28
    if kind == "nf":
        channels, side = (checkpoint["config"][key] for key in ("input_channels", "side"))
        schedule = DiffusionSchedule(**checkpoint["schedule"]).to(device)
        sampling = dict(num_steps=args.steps or min(50, schedule.num_timesteps), eta=args.eta)
        schedule.timesteps(sampling["num_steps"])  # raises if there are too many
    if args.image:
        if kind != "nf":
            raise ValueError(f"--image needs a neural field, and {path} is an autoencoder")
        name, images = args.image.name, [args.image]
        problem = picture_problem(args.image, channels, args.mask, args.input_ratio, args.upscale,
                                  args.seed)
        results = report_picture(model, schedule, *problem, folder, args.sampler, args.seed,
                                 **sampling)
    else:
        wanted = args.data or ("auto" if path == SHIPPED else checkpoint["data"])
        real = "cifar10" if channels == 3 else "mnist"
        name, images, _ = load_dataset(wanted, args.data_dir, train=False, real=real)
        if images.shape[1:] != (channels, side, side):
            raise ValueError(f"{path} takes images of {channels} x {side} x {side}, and those of "
                             f"{name} are {tuple(images.shape[1:])}")
        images = images[:args.evaluate if kind == "nf" else None].to(device)
        if kind == "nf":
            results = report_field(model, schedule, images, folder, name, args.seed, args.samples,
                                   args.scale, args.gif, input_ratio=args.input_ratio,
                                   full=args.full, sampler=args.sampler or "ddim", **sampling)
        else:
            results = report_autoencoder(model, images, folder, name, args.seed)
    if args.json:
        write_json(args.json, dict(checkpoint=str(path), data=name, images=len(images),
                                   seed=args.seed, methods=results))
        print(f"figures: {args.json}")
    print(f"{time.time() - start:.0f} s on {device}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: use a smaller --evaluate or --samples")
    except KeyboardInterrupt:
        sys.exit(130)
