"""Use a trained neural field: measure it, show it, restore a photograph.

    python sample.py                                  # newest checkpoint below out/, or shipped
    python sample.py --image photo.jpg                # restore a photograph from 20% of its pixels
    python sample.py --image damaged.png --mask mask.png      # white pixels of the mask: missing
    python sample.py --image photo.jpg --size 32 --gif        # its middle square, 32 x 32
    python sample.py out/nf/checkpoint.pt --evaluate  # 1,000 test images: MSE, MAE, PSNR, SSIM
    python sample.py --steps 1000 --eta 1             # samples by all timesteps: DDPM
    python sample.py --full --scale 4                 # all missing pixels in a sample; a fine grid
    python sample.py --evaluate 20 --samples 32       # does their spread fit the error?

Everything that restores an image is a function of the same three tensors: output_coords
(B, N_out, 2), input_coords (B, N_in, 2) and input_values (B, N_in, C) in [-1, 1]. It returns values
at the output coordinates, (B, N_out, C).
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported
import io
import json
import math
import sys
import time
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

from autoencoder import DenoisingAutoencoder, report_autoencoder
from data import (between, check_place, fixed_order, heat, image_grid, load_dataset, load_picture,
                  make_parser, off_grid_split, open_picture, put_pixels, run, save_pictures,
                  sparse_split, square_picture, to_picture, to_signed, to_unit, write_whole)
from nf_denoiser import (GaussianField, NFDenoiser, ddim_sample, exponential_covariance,
                         likely_variance, one_step_mean, read_at, scatter)
from noise import psnr, ssim
from schedule import DiffusionSchedule


# ------------------------------------------------------ classical methods: no training, no network
def nearest(output_coords, input_coords, input_values):
    """The value of the nearest input pixel."""
    index = torch.cdist(output_coords, input_coords).argmin(dim=2, keepdim=True)
    return input_values.take_along_dim(index, dim=1)


def kriging(output_coords, input_coords, input_values, covariance):
    """The mean of a Gaussian random field, given the inputs: GaussianField of nf_denoiser.py.

    Of two inputs side by side, each gets about half the weight of one alone. covariance: (P, P).
    """
    mean = input_values.mean(dim=1, keepdim=True)                          # (B, 1, C)
    field = GaussianField(covariance.to(input_values))
    _, values, _ = field(input_coords, input_values - mean, output_coords)
    return mean + values


# ------------------------------------------------------------- two answers: the mean and a sample
@torch.no_grad()
def reconstruct(model, schedule, split, draw=None, n_drawn=0):
    """The values of all outputs of a split by each method: {method: (B, N_out, C)} in [-1, 1].

    The one-step mean estimates E[x_0 | x_in], the mean of all images that fit the input. No answer
    has a lower expected squared error, but it is blurred. A sample is one of those images: sharp,
    with about twice that error: it and the truth differ from the mean equally and independently.
    draw: ddim_sample with model and schedule filled in, or None. It denoises the first n_drawn
    outputs (the measured ones) jointly; the rest are the mean, given the input and the drawn ones.
    """
    coords = split["output_coords"]
    known = split["input_coords"], split["input_values"]
    answers = {"one-step mean": one_step_mean(model, schedule, coords, *known)}
    if draw:
        answers["sample"] = draw_sample(model, schedule, split, draw, n_drawn)
    covariance = exponential_covariance(split["full_image"].shape[-1])
    answers["kriging"] = kriging(coords, *known, covariance)
    answers["inverse distance"] = inverse_distance(coords, *known)
    answers["nearest"] = nearest(coords, *known)
    return {method: values.clamp(-1, 1) for method, values in answers.items()}


def draw_sample(model, schedule, split, draw, n_drawn):
    """The sample of reconstruct: (B, N_out, C) in [-1, 1]."""
    drawn, others = split["output_coords"].tensor_split([n_drawn], dim=1)
    values = draw(drawn, split["input_coords"], split["input_values"]).clamp(-1, 1)
    known_coords = torch.cat([split["input_coords"], drawn], dim=1)
    known_values = torch.cat([split["input_values"], values], dim=1)
    mean = one_step_mean(model, schedule, others, known_coords, known_values)
    return torch.cat([values, mean], dim=1).clamp(-1, 1)


# -------------------------------------------------------------- a photograph, window after window
@torch.no_grad()
def restore(image, input_mask, answer, side=32, on_step=None, wanted=True):
    """Fill the missing pixels of an image of any size by a method for side x side pixels.

    image: (C, H, W) in [-1, 1]. input_mask: bool (H, W), the given pixels; ValueError without any.
    answer: such as nearest. wanted: bool (H, W), the pixels needed. on_step: see restore_windows.
    Returns (C, H, W), the given pixels unchanged.

    Overlapping windows are restored and averaged (restore_windows). The picture is then restored at
    half its size too, by this function, where holes are smaller and a window reaches farther. Near
    given pixels the full size is used, which has the detail; beyond 4 pixels the smaller one.
    """
    if not input_mask.any():
        raise ValueError("no pixel of the picture is given: there is nothing to restore it from")
    restored = restore_windows(image, input_mask, answer, side, on_step, wanted)
    mask = input_mask[None].to(image)                                        # (1, H, W)
    depth = depth_of_holes(mask)  # 0 up to 2 pixels from a given one, 1 beyond 4
    if not depth.any():  # every pixel is near a given one: no smaller size is needed
        return restored
    half = torch.nn.AvgPool2d(2, ceil_mode=True)
    given = half(mask)
    small = half(image * mask) / given.clamp(min=0.1)  # the mean of the given ones of four pixels
    used = F.max_pool2d(depth, 4, stride=2, padding=1, ceil_mode=True)[0] > 0  # read below
    small = restore(small, given[0] > 0, answer, side, on_step, used)
    small = F.interpolate(small[None], scale_factor=2, mode="bilinear")[0]
    return torch.lerp(restored, small[:, :image.shape[1], :image.shape[2]], depth)


# ================== below: windows, splits, tables, pictures, checkpoints, command line
def restore_windows(image, input_mask, answer, side, on_step=None, wanted=True):
    """Like restore, at one size. on_step: called with the numbers of windows done and of all.

    wanted: bool (H, W), the missing pixels whose windows are computed; others may be left.
    Windows overlap by one half. Near its edge a window sees one side of a pixel only, so answers
    are averaged with a weight, sin^2, that falls to 0 there. A window inside a hole sees nothing:
    those with fewer than a quarter of the known pixels of the best one wait for a later pass, when
    restored pixels count as known. So holes are filled from their rim.
    """
    height, width = input_mask.shape
    rows = window_lines(height, side).to(image.device)                       # (windows, side)
    columns = window_lines(width, side).to(image.device)
    coords = grid_coords(side).to(image)                                     # (side * side, 2)
    ramp = torch.sin(math.pi * (torch.arange(side) + 0.5) / side) ** 2
    weight = torch.outer(ramp, ramp).flatten().to(image)                     # (side * side,)
    pixels = image.flatten(1).mT.clone()                                     # (H * W, C)
    known, done = input_mask.clone(), 0
    while (missing := wanted & ~known).any():
        to_do = missing[rows][:, :, columns].any(dim=3).any(dim=1)           # (rows, columns)
        counts = known[rows][:, :, columns].sum(dim=(1, 3)) * to_do
        ready = (counts >= max(1, counts.max() / 4)).nonzero()               # (N, 2): row, column
        if not len(ready):  # nothing known is near what is wanted: fill towards it
            wanted = True
            continue
        windows = done + int(to_do.sum())
        total = image.new_zeros(height * width, len(image) + 1)  # the last one: of the weights
        for batch in split_by_counts(ready, counts[tuple(ready.mT)]):
            if on_step:
                on_step(done, windows)
            row, column = batch.mT
            window = rows[row][:, :, None] * width + columns[column][:, None]
            window = window.flatten(1)                                       # (B, side * side)
            given = known.flatten()[window]
            inputs = repeat_to_equal_counts(given)                           # (B, N_in)
            input_values = pixels[window.gather(1, inputs)]                  # (B, N_in, C)
            outputs = coords.expand(len(window), -1, -1)
            values = answer(outputs, coords[inputs], input_values).clamp(-1, 1)
            shares = (weight * ~given)[..., None]                            # (B, side * side, 1)
            values = torch.cat([values * shares, shares], dim=2)
            # index_add_ instead of +=: windows share pixels, and mirrored ones have some twice
            total.index_add_(0, window.flatten(), values.flatten(0, 1))
            done += len(batch)
        filled = total[:, -1] > 0
        pixels[filled] = total[filled, :-1] / total[filled, -1:]
        known |= filled.view_as(known)
    return pixels.mT.view_as(image)


def inverse_distance(output_coords, input_coords, input_values):
    """The mean of all input pixels, weighted by distance^-4 (Shepard, 1968)."""
    distance = torch.cdist(output_coords, input_coords).clamp(min=1e-6)
    weights = distance**-4                                                 # (B, N_out, N_in)
    return weights / weights.sum(dim=2, keepdim=True) @ input_values


def depth_of_holes(mask):
    """0 where a given pixel of mask (1, H, W) is within 2 pixels, 1 where none is within 4."""
    near = F.max_pool2d(mask, 3, stride=1, padding=1)
    depth = 0
    for _ in range(3):
        near = F.max_pool2d(near, 3, stride=1, padding=1)
        depth += (1 - near) / 3
    return depth


def window_lines(length, side):
    """The rows (or columns) of all windows along a picture: int64 (windows, side).

    k + 1 windows take side + k * side / 2 pixels: the picture is mirrored up to the next such size.
    """
    extra = max(side - length, (side - length) % (side // 2))
    lines = np.pad(np.arange(length), (0, extra), "symmetric")
    return torch.from_numpy(lines).unfold(0, side, side // 2)


def split_by_counts(windows, counts):
    """Batches of at most 16 windows whose numbers of given pixels, counts, differ by at most 3%."""
    counts, order = counts.sort(descending=True)
    _, sizes = (counts.log() / 0.03).int().unique_consecutive(return_counts=True)
    for group in windows[order].split(sizes.tolist()):
        yield from group.split(16)


def repeat_to_equal_counts(given):
    """The places of the given pixels in each row of a bool (B, P): int64 (B, largest count).

    Rows with fewer repeat theirs from the start.
    """
    counts = given.sum(dim=1, keepdim=True)
    places = given.byte().argsort(dim=1, descending=True, stable=True)
    numbers = torch.arange(counts.max(), device=given.device)
    return places.gather(1, numbers % counts)


@torch.no_grad()
def mean_of_windows(model, schedule, output_coords, input_coords, input_values):
    """Like one_step_mean, but each window is seen once: half the time.

    In every other window x and y change places. A pixel lies in up to four windows, so its answers
    are still averaged over two ways. Mirrored windows are 0.1 dB worse (assets/runs.csv).
    """
    numbers = torch.arange(len(input_values), device=input_values.device)
    t = torch.full_like(numbers, schedule.timesteps - 1)
    as_it_is = (numbers % 2 == 0)[:, None, None]
    output_coords = output_coords.where(as_it_is, output_coords.flip(2))
    input_coords = input_coords.where(as_it_is, input_coords.flip(2))
    return model(None, output_coords, t, input_coords, input_values)


class PrecisionField(GaussianField):
    """The same posterior, faster where most pixels of the grid are given.

    With Q = (K + D)^-1 of all pixels, the mean of the missing ones solves Q_mm y_m = -Q_ms y_s
    (Bishop, 2006, eq. 2.75): as many equations as pixels are missing, not as are given. The
    weights (K_ss + D)^-1 y_s are then Q y. A pixel that is given twice counts once.
    """

    def __init__(self, covariance):
        super().__init__(covariance)
        # in float32 the inverse would lose digits, and a Mac's GPU has no float64
        K = covariance.cpu().double()
        K.diagonal().add_(self.jitter)
        self.Q = torch.linalg.inv(K).to(covariance)

    def forward(self, input_coords, y_in, output_coords, y_t=None, noise_variance=None):
        """Arguments and results are those of GaussianField; the input is on the grid."""
        if y_t is not None or 2 * y_in.shape[1] < len(self.Q):
            return super().forward(input_coords, y_in, output_coords, y_t, noise_variance)
        side = math.isqrt(len(self.Q))
        seen = scatter(input_coords, torch.ones_like(y_in[..., :1]), side).flatten(2)
        y = scatter(input_coords, y_in, side).flatten(2)                       # (B, C, P)
        for image, given, right in zip(y, seen[:, 0], y @ self.Q):
            m = (given == 0).nonzero()[:, 0]
            factor = torch.linalg.cholesky(self.Q[m[:, None], m])
            image[:, m] = -torch.cholesky_solve(right[:, m].T, factor).T
        weights = y @ self.Q
        variance = likely_variance((y * weights).sum(dim=2), seen.sum(dim=2))  # (B, C)
        # K w is y - D w at the seen pixels; at the missing ones, where w is 0, it is y
        image = (y - self.jitter * weights * seen).unflatten(2, (side, side))
        return image, read_at(image, output_coords), variance[:, None]


def grid_coords(side):
    """(x, y) of all pixels, row by row: (side * side, 2) in [0, 1]."""
    line = torch.linspace(0, 1, side)
    return torch.cartesian_prod(line, line).flip(1)


def split_images(images, indices, seed=0, input_ratio=0.2, full=False, pixels="grid"):
    """A split of images (B, C, H, W), all missing pixels as outputs; how many to draw and measure.

    The mask is a function of seed and an image's index, indices (B,). pixels: "grid" or
    "anywhere", where the input lies. A fifth of the image is measured, or with `full` all outputs.
    Pixels that are nan, the same ones in all images, are neither input nor output, and grey.
    Raises ValueError for too many of them.
    """
    total, anywhere = images[0, 0].numel(), pixels == "anywhere"
    coordinates = 2 * int(total * input_ratio) if anywhere else 0  # of the input
    order = fixed_order(seed, indices, total + coordinates).to(images.device)
    unknown = images[0, 0].isnan().flatten()
    order[:, :total] += unknown  # these come last
    make_split = off_grid_split if anywhere else sparse_split
    split = make_split(images.nan_to_num(), input_ratio, None, order=order)
    n_unknown = int(unknown.sum())
    n_out = split["output_indices"].shape[1] - n_unknown
    if n_unknown and (n_out < 1 or anywhere):
        raise ValueError(f"{n_unknown} of {total} pixels are transparent: --size and --pixels "
                         f"anywhere need a picture with fewer such pixels")
    for key in ("output_indices", "output_coords", "output_values"):
        split[key] = split[key][:, :n_out]
    return split, n_out if full else min(n_out, total // 5)


def assemble(split, values=None):
    """Images (B, C, H, W) in [0, 1]: the input pixels, and values (B, N, C) in [-1, 1] at the first
    N outputs; grey elsewhere."""
    grey = torch.zeros_like(split["full_image"])
    image = put_pixels(grey, split["input_indices"], split["input_values"])
    if values is not None:
        image = put_pixels(image, split["output_indices"][:, :values.shape[1]], values)
    return to_unit(image)


def evaluate_field(model, schedule, images, draw=None, batch=25, **options):
    """{method: {"mse", "mae", "psnr", "ssim"}} over images (N, C, H, W), values in [0, 1].

    MSE and MAE are over the measured pixels, PSNR is that of the mean MSE, SSIM is of whole images
    with the input pixels kept. draw: see reconstruct. options: those of split_images.
    """
    figures = {}
    for indices in torch.arange(len(images)).split(batch):
        split, n_out = split_images(images[indices], indices, **options)
        truth = to_unit(split["full_image"])
        for method, values in reconstruct(model, schedule, split, draw, n_out).items():
            error = to_unit(values) - to_unit(split["output_values"])
            error = error[:, :n_out].double()
            mse = error.square().mean(dim=(1, 2))                          # (B,)
            mae = error.abs().mean(dim=(1, 2))
            similarity = ssim(assemble(split, values), truth)
            part = torch.stack([mse, mae, similarity])                     # (3, B)
            figures.setdefault(method, []).append(part)
    for method, parts in figures.items():
        mse, mae, similarity = torch.cat(parts, dim=1).mean(dim=1).tolist()
        figures[method] = dict(mse=mse, mae=mae, psnr=psnr(mse), ssim=similarity)
    return figures


def covered(samples, truth):
    """Which true values (...) lie in the central 90% of samples (K, ...)? 1.0 or 0.0, (...).

    If the truth is just one more draw from the distribution of the samples, its rank among them is
    any of 0..K, equally often, and about 90% of the ranks are in the middle: 29 of 33 for K = 32.
    Fewer hits mean that the samples are too much alike, or in the wrong place; more, that they
    scatter too much. A sample that equals the truth counts half below and half above it.
    """
    below = (samples < truth).float().mean(dim=0)
    not_above = (samples <= truth).float().mean(dim=0)
    rank = (below + not_above) / 2                                         # 0 to 1
    return ((rank >= 0.05) & (rank <= 0.95)).float()


def evaluate_samples(model, schedule, images, draw, count, **options):
    """What `count` samples of each image say about it: (figures, rows for image_grid).

    Figures, values in [0, 1]: coverage, the mean of `covered`; spread, the mean standard deviation;
    psnr_mean, the PSNR of the samples' mean.
    """
    total, rows = 0, []
    for i, image in enumerate(images):
        copies = image.expand(count, -1, -1, -1)
        split, n_out = split_images(copies, torch.full((count,), i), **options)
        values = draw_sample(model, schedule, split, draw, n_out)
        samples = assemble(split, values)
        truth = to_unit(split["full_image"][0])
        mean, std = samples.mean(dim=0), samples.std(dim=0)
        error = mean - truth
        maps = heat(std, 0.25), heat(error, 0.25)
        rows.append([*samples[:2], mean, truth, *maps])
        figures = torch.stack([covered(samples, truth), std, error.square()])
        measured = split["output_indices"][0, :n_out]
        total += figures.flatten(2)[:, :, measured].mean(dim=(1, 2))
    coverage, spread, mse = (total / len(images)).tolist()
    return dict(coverage=coverage, spread=spread, psnr_mean=psnr(mse)), rows


# -------------------------------------------------------------------------------------- pictures
def draw_field(split, answers):
    """Input pixels, three answers, truth, error of mean; PSNR below. answers: of reconstruct."""
    methods = ["kriging", "one-step mean", "sample"]
    columns = [assemble(split, answers[method]) for method in methods]
    truths = to_unit(split["full_image"])
    rows, captions = [], []
    for given, truth, *images in zip(assemble(split), truths, *columns):
        rows.append([given, *images, truth, heat(images[1] - truth)])
        mses = [(image - truth).square().mean().item() for image in images]
        captions.append(["", *(f"{psnr(mse):.1f} dB" for mse in mses), "", "white: 0.5"])
    labels = ["input pixels", *methods, "truth", "error of mean"]
    return image_grid(rows, labels, captions=captions)


def draw_fine(model, schedule, split, scale):
    """The field on a grid `scale` times as fine, between the input and the truth."""
    truth = split["full_image"]
    side = scale * truth.shape[3]
    coords = grid_coords(side).to(truth).expand(len(truth), -1, -1)
    fine = one_step_mean(model, schedule, coords, split["input_coords"], split["input_values"])
    fine = fine.mT.unflatten(2, (side, side))
    rows = zip(assemble(split), to_unit(fine), to_unit(truth))
    labels = ["input pixels", f"model x{scale}", "truth"]
    return image_grid(list(rows), labels, zoom=scale * max(1, 6 // scale))


def animate(split, frames, path):
    """A GIF of three images at up to 50 of the steps, frames: (t, x_t, x_0_hat) of each."""
    step = max(1, len(frames) // 25)
    pictures = []
    for t, x_t, x_0_hat in frames[::step] + frames[-1:] * 10:
        rows = [assemble(split, x)[:3] for x in (x_t, x_0_hat)]
        picture = image_grid(rows, [f"t = {t}"], ["x_t", "prediction"], zoom=3)
        pictures.append(picture.quantize(64))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0)
    print(f"animation: {path}")


# --------------------------------------------------------------------------------------- reports
def report_field(model, schedule, images, folder, name, num_steps=50, eta=0.0, seed=0,
                 samples=None, scale=1, gif=False, **options):
    """Print the table of evaluate_field, draw the pictures, return {method: figures}.

    images: (N, C, H, W), called `name`. samples: how many for evaluate_samples, if any. options:
    those of split_images.
    """
    options["seed"] = seed
    generator = torch.Generator().manual_seed(seed)
    draw = partial(ddim_sample, model, schedule, num_steps=num_steps, eta=eta, generator=generator)

    def draw_and_record(*where):
        return draw(*where, on_step=lambda *step: frames.append(step))

    results = evaluate_field(model, schedule, images, draw, **options)
    first = torch.arange(len(images))[:6]
    split, n_out = split_images(images[first], first, **options)
    frames = []
    answers = reconstruct(model, schedule, split, draw_and_record, n_out)
    pictures = {"samples.png": draw_field(split, answers)}
    print(f"{name}: {len(images):,} images, {split['input_indices'].shape[1]} pixels given, "
          f"{n_out} measured, sample in {len(frames)} steps, mask seed {seed}")
    print(f"{'':18}{'MSE':>10}{'MAE':>10}{'PSNR dB':>10}{'SSIM':>10}")
    for method, row in results.items():
        print(f"{method:18}{row['mse']:10.5f}{row['mae']:10.5f}{row['psnr']:10.2f}"
              f"{row['ssim']:10.4f}")
    if samples:
        row, rows = evaluate_samples(model, schedule, images, draw, samples, **options)
        results["samples"] = row
        print(f"{samples} samples per image: {row['coverage']:.1%} of the true values in the "
              f"central 90%, standard deviation {row['spread']:.4f}, PSNR of their mean "
              f"{row['psnr_mean']:.2f} dB")
        labels = ["sample 1", "sample 2", "mean", "truth", "std. deviation", "error of mean"]
        pictures["spread.png"] = image_grid(rows[:4], labels, zoom=3)
    if scale > 1:
        pictures["scale.png"] = draw_fine(model, schedule, split, scale)
    save_pictures(folder, pictures)
    if gif:
        animate(split, frames, folder / "denoising.gif")
    return results


def report_picture(model, schedule, path, folder, mask=None, input_ratio=0.2, seed=0):
    """Restore a picture by the one-step mean; write NAME-restored.png and NAME-comparison.png.

    Arguments and errors are those of load_picture. Where the truth is known, nearest and kriging
    are compared with it: returns {method: {"psnr"}}, in dB over the missing pixels, otherwise {}.
    """
    image, input_mask, has_truth, info = load_picture(path, len(model.colours), mask, input_ratio,
                                                      seed)
    stem, info["pnginfo"] = name_results(folder, path)
    device = schedule.betas.device
    image, input_mask = image.to(device), input_mask.to(device)
    given = to_signed(image) * input_mask
    methods = {"one-step mean": partial(mean_of_windows, model, schedule)}
    if has_truth:
        krige = partial(kriging, covariance=exponential_covariance(model.side))
        methods = {"nearest": nearest, "kriging": krige, **methods}
    if isinstance(model.posterior, GaussianField):
        model.posterior = PrecisionField(model.posterior.covariance)
    # the comparison is for the eye: at most 1,000 pixels a side
    reduced = torch.nn.AvgPool2d(math.ceil(max(input_mask.shape) / 1000), ceil_mode=True)
    columns, results = {"given": reduced(to_unit(given))}, {}
    for name, answer in methods.items():
        restored = restore(given, input_mask, answer, model.side, show_progress(name))
        if has_truth:
            error = (restored - to_signed(image))[:, ~input_mask] / 2
            decibels = psnr(error.square().mean().item())
            results[name] = dict(psnr=decibels)
            name = f"{name:14}{decibels:6.2f} dB"
            print(name, flush=True)
        columns[name] = reduced(to_unit(restored))
    if has_truth:
        columns["truth"] = reduced(image / 255)
    picture = to_picture(to_unit(restored))  # of the last method
    if (given == given[:1]).all():
        picture = picture.convert("L")  # grey stays grey
    zoom = max(1, 256 // max(input_mask.shape))
    comparison = image_grid([list(columns.values())], list(columns), zoom=zoom)
    pictures = {f"{stem}-restored.png": picture, f"{stem}-comparison.png": comparison}
    save_pictures(folder, pictures, **info)
    missing = ~input_mask
    print(f"{missing.sum():,} of {missing.numel():,} pixels ({missing.float().mean():.1%}) were "
          f"{'hidden' if has_truth else 'missing'} and are restored; the others are unchanged")
    return results


def name_results(folder, path):
    """What the results of the picture at `path` are called, and the PNG text that marks them.

    They have its name without extension, and a checksum of its path if the results of another file
    have that name already.
    """
    source = f"{zlib.crc32(bytes(path.resolve())):08x}"
    text = PngImagePlugin.PngInfo()
    text.add_text("Source", source)
    result = folder / f"{path.stem}-restored.png"
    if not result.exists():
        return path.stem, text
    with suppress(OSError), Image.open(result) as old:  # which may be damaged
        if old.info.get("Source") == source:
            return path.stem, text
    return f"{path.stem}-{source}", text


def show_progress(method):
    """A function (done, total) that prints how many windows are done, and the seconds left."""
    times = []

    def show(done, total):
        if done == 0:
            times.clear()
        times.append(time.time())
        seconds = times[-1] - times[0]
        left = seconds / max(done, 1) * (total - done)
        if len(times) == 5 and left > 90:  # the first batches tell how long it will take
            print(f"{method}: {total:,} windows, about {left / 60:.0f} minutes", flush=True)
        if sys.stdout.isatty():
            line = f"{method}: {done:,} of {total:,} windows, {left:.0f} s left"
            print(line, end="\x1b[K\r", flush=True)
    return show


# ----------------------------------------------------------------------------------- checkpoints
SHIPPED = Path(__file__).resolve().parent / "assets" / "nf_medium.pt"
KEYS = ("kind", "config", "settings", "schedule", "data", "step")  # beside "model", the weights


def load_checkpoint(path, device="cpu"):
    """A checkpoint of train.py, loaded without running code in it: (model, the whole dict).

    Raises FileNotFoundError, and ValueError for a file that is damaged or no such checkpoint.
    """
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at checksums
            raise ValueError("it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kind, config, *_ = (checkpoint[key] for key in KEYS)
        DiffusionSchedule(**checkpoint["schedule"])  # refuses unknown schedules here
        weights = {name: value.float() for name, value in checkpoint["model"].items()}
        if kind == "nf":
            model = NFDenoiser(weights["alphas_cumprod"], **config)
        elif kind in ("dae", "ae"):
            model = DenoisingAutoencoder(**config)
        else:
            raise ValueError("it holds another kind of model")
        model.load_state_dict(weights)
    except FileNotFoundError:
        raise  # its message names the file
    except Exception as problem:  # a foreign or damaged file can fail in any way
        reason = f"{type(problem).__name__}: {str(problem).strip()}".split("\n")[0][:150]
        reason = reason.replace("\x1b[1m", "")  # torch sets it in bold
        raise ValueError(f"{path} is not a checkpoint of this version of train.py ({reason}); a "
                         f"picture is restored by --image") from None
    return model.to(device).eval(), checkpoint


def save_checkpoint(path, checkpoint, set_aside=None):
    """Write a checkpoint, so that a kill or a full disk leaves the old file as it is.

    set_aside: a path for a copy of the old file, if it is to be kept. Raises OSError.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    if set_aside:
        write_whole(set_aside, path.read_bytes())
    write_whole(path, buffer.getbuffer())


def export(model, checkpoint, path):
    """Write what sampling needs: KEYS, and the weights in half precision."""
    weights = dict(checkpoint["model"])
    for name, p in model.named_parameters():
        weights[name] = p.detach().half().cpu()
    exported = {key: checkpoint[key] for key in KEYS}
    save_checkpoint(path, {**exported, "model": weights})
    print(f"exported: {path}")


def pick_device(name):
    """torch.device(name). Raises ValueError if this machine does not have it."""
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except Exception as problem:  # each kind of device has its own
        reason = str(problem).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None


def write_json(path, checkpoint, data, methods, **more):
    """Write figures, {method: figures}, and where they come from."""
    figures = dict(checkpoint=str(checkpoint), data=str(data), **more, methods=methods)
    write_whole(path, (json.dumps(figures, indent=1) + "\n").encode())
    print(f"figures: {path}")


# ------------------------------------------------------------------------------------------ main
def parse_arguments(argv):
    parser = make_parser(__doc__, default_data="what the model was trained on")
    parser.set_defaults(data=None)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, help="default: newest below --out; --image: shipped")
    add("--steps", type=between(1, 1000), help="number of DDIM steps, default 50")
    add("--eta", type=between(0, 1, float), default=0.0,
        help="randomness of DDIM, 0 to 1; 1 with --steps 1000 is DDPM")
    add("--seed", type=between(0, 2**31 - 1), default=0, help="seed of masks and noise")
    add("--input-ratio", type=between(0.0001, 0.9999, float), default=0.2,
        help="share of the pixels that is given")
    add("--pixels", choices=["grid", "anywhere"],
        help="where the input lies (default: what the model was trained on)")
    add("--samples", type=between(2, 1000), help="measure the spread of so many samples")
    add("--full", action="store_true", help="sample all missing pixels jointly")
    add("--scale", type=between(1, 16), default=1, help="draw on a grid this many times as fine")
    add("--gif", action="store_true", help="animate the denoising")
    add("--image", type=Path, help="restore this picture; missing: --mask, transparent, or random")
    add("--mask", type=Path,
        help="as large as --image; levels from 16 of 255 are missing (in a JPEG file: those above "
             "its noise), of two levels the higher one")
    add("--size", type=between(1, 64), help="reduce --image to the size of the training images, 32")
    add("--evaluate", type=between(1, 10**6), nargs="?", const=1000,
        help="measure on so many test images (1,000 if no number is given; default 6, of an "
             "autoencoder all)")
    add("--export", type=Path, help="write the weights alone, in half precision, to this file")
    add("--json", type=Path, help="write the figures of the table to this file")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if (args.mask or args.size) and not args.image:
        parser.error("--mask and --size are for --image")
    if args.mask and (args.size or args.seed or args.input_ratio != 0.2):
        parser.error("--size, --seed and --input-ratio take a complete picture: no --mask")
    if args.image and (args.evaluate or args.data):
        parser.error("--evaluate and --data are for test images, not for --image")
    args.sampling = any([args.steps, args.eta, args.samples, args.full, args.gif, args.scale > 1,
                         args.pixels])
    if args.image and not args.size and args.sampling:
        parser.error("--image draws no samples: add --size 32 to see its middle as they do")
    if args.export and (args.image or args.evaluate or args.json or args.sampling):
        parser.error("--export writes the weights and does nothing else")
    return args


def checksum(images):
    """What tells sets of images apart, uint8 (N, C, H, W): their number and a checksum, as text."""
    return f"{len(images):,} with checksum {zlib.crc32(images.contiguous().numpy()):08x}"


def load_images(checkpoint, args):
    """Test images, or the middle square of --image: (name, images (N, C, H, W))."""
    config = {"channels": 1, "side": 28} | checkpoint["config"]
    channels, side = config["channels"], config["side"]
    name = args.image
    if name:
        picture = open_picture(name)
        images = to_signed(square_picture(picture, channels, args.size))[None]
        alpha = picture.getchannel("A").convert("RGBA")
        images.masked_fill_(square_picture(alpha, 1, args.size) < 128, math.nan)
    else:
        shipped = args.checkpoint.resolve() == SHIPPED  # it must work without a network
        name = args.data or ("auto" if shipped else checkpoint["data"])
        own_folder = not args.data and os.path.isabs(name)
        if own_folder and not os.path.isdir(name):
            raise ValueError(f"{args.checkpoint} was trained on pictures in {name}, which is not "
                             f"there now: add --data and the folder that has them")
        real = "cifar10" if channels == 3 else "mnist"
        name, images, _ = load_dataset(name, args.data_dir, train=False, real=real)
        if own_folder and checkpoint["settings"].get("test_images") != checksum(images):
            print(f"notice: {name} has other pictures than in training: some of the test images "
                  f"may have been trained on")
    if images.shape[1:] != (channels, side, side):
        raise ValueError(f"{args.checkpoint} takes images of {channels} x {side} x {side}, and "
                         f"those of {name} are {tuple(images.shape[1:])}")
    return name, images.to(args.device)


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_flush_denormal(True)  # weights of far pixels are below 1e-38, and CPUs slow at that
    start = time.time()
    args.device = pick_device(args.device)
    if not args.checkpoint:
        trained = [] if args.image else args.out.rglob("checkpoint.pt")
        args.checkpoint = max(trained, key=os.path.getmtime, default=SHIPPED)
    if args.checkpoint == SHIPPED and not SHIPPED.exists():
        raise ValueError(f"no checkpoint below {args.out}: train one with python train.py")
    for path in filter(None, (args.json, args.export)):
        check_place(path)
        if path.exists() and path.samefile(args.checkpoint):
            raise ValueError(f"--json or --export {path} is the checkpoint itself, which could not "
                             f"be resumed any more: choose another name")
    model, checkpoint = load_checkpoint(args.checkpoint, args.device)
    kind, settings = checkpoint["kind"], checkpoint["settings"]
    print(f"{args.checkpoint}: {kind}, {checkpoint['step']:,} steps on {checkpoint['data']}")
    if args.export:
        return export(model, checkpoint, args.export)
    for_field = args.sampling or args.image or args.seed or args.input_ratio != 0.2
    if kind != "nf" and for_field:
        raise ValueError(f"{args.checkpoint} is an autoencoder, and these flags are for a neural "
                         f"field: give the path of its checkpoint")
    schedule = DiffusionSchedule(**checkpoint["schedule"]).to(args.device)
    folder, count = args.out / kind, 1
    check_place(folder / "samples.png")  # before the work, not after it
    if args.image and not args.size:
        name = args.image
        figures = report_picture(model, schedule, name, folder, args.mask, args.input_ratio,
                                 args.seed)
    else:
        name, images = load_images(checkpoint, args)
        images = images[:args.evaluate or (6 if kind == "nf" else None)]
        count = len(images)
        if kind == "nf":
            figures = report_field(
                model, schedule, images, folder, name, args.steps or 50, args.eta, args.seed,
                args.samples, args.scale, args.gif, input_ratio=args.input_ratio, full=args.full,
                pixels=args.pixels or settings.get("pixels", "grid"))
        else:
            figures = report_autoencoder(model, images, folder, settings["noise"])
    if args.json:
        write_json(args.json, args.checkpoint, name, figures, images=count, seed=args.seed)
    print(f"{time.time() - start:.0f} s on {args.device}")


if __name__ == "__main__":
    run(main)
