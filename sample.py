"""Use a trained model: sample from it, measure it beside the classical alternatives, draw what it does.

    python sample.py                                   # the newest checkpoint below out/, or the shipped one
    python sample.py out/nf/checkpoint.pt --evaluate   # 1,000 test images: MSE, MAE, PSNR, SSIM of every method
    python sample.py --sampler ddim --steps 20 --eta 1 # fewer steps, DDPM's noise;  --sampler ddpm walks all of them
    python sample.py --full --gif                      # every missing pixel as one joint sample; denoising animated
    python sample.py --scale 4                         # the field asked on a grid 4 times as fine
    python sample.py --image photo.png --input-ratio 0.1
    python sample.py --evaluate 200 --input-ratio 0.05 0.1 0.2 0.3 0.5     # one table over all of them
    python sample.py --evaluate 20 --samples 32        # are the samples' doubts honest? coverage, spread, CRPS

Two answers of the neural field are shown. The one-step mean is its prediction at t = T - 1 from pure noise, an
estimate of E[x_0 | x_in], the best there is in squared error, and blurred where the input leaves things open. A sample
is denoised step by step (DDIM or DDPM): a plausible image, whose squared error is larger by nature.

PSNR is -10 log10(mean squared error over all images), values in [0, 1]. SSIM: Wang et al. (2004).
"""
import argparse
import json
import math
import os
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from autoencoder import DenoisingAutoencoder
from data import DATASETS, fail, fixed_keys, image_grid, load_dataset, scatter_pixels, sparse_split
from nf_denoiser import NFDenoiser, kriging
from noise import NOISES
from schedule import DiffusionSchedule

SHIPPED = Path(__file__).resolve().parent / "assets" / "nf_small.pt"  # used where nothing has been trained yet

# ------------------------------------------------------------------------------------------------------ samplers


def ddim_sample(model, schedule, output_coords, input_coords, input_values, num_steps=50, eta=0.0, generator=None,
                on_step=None):
    """Denoise a Gaussian random field at output_coords, step by step. DDIM (Song et al., 2021), eq. 12 and 16.

    model(x_t, output_coords, t, input_coords, input_values) -> x_0_hat; output_coords (B, N_out, 2), input_coords
    (B, N_in, 2), input_values (B, N_in, C) in the model's range, never changed. eta: 0 is deterministic given the first
    noise, 1 is as random as DDPM. A model with a method `prepare` is given what that returns as `prepared`.
    on_step(t, x_t, x_0_hat) is called after every step.
    Returns (B, N_out, C), not clamped. Raises ValueError for num_steps outside 1..T or eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    steps = schedule.timesteps(num_steps).tolist()
    update = lambda x_t, x_0, t, t_next, noise: schedule.ddim_step(x_t, x_0, t, t_next, eta, noise)
    return _denoise(model, steps, update, output_coords, input_coords, input_values, generator, on_step)


def ddpm_sample(model, schedule, output_coords, input_coords, input_values, generator=None, on_step=None):
    """Ancestral sampling over all T timesteps. DDPM (Ho et al., 2020), algorithm 2. Arguments as in ddim_sample."""
    steps = schedule.timesteps(schedule.num_timesteps).tolist()
    update = lambda x_t, x_0, t, t_next, noise: schedule.ddpm_step(x_t, x_0, t, noise)
    return _denoise(model, steps, update, output_coords, input_coords, input_values, generator, on_step)


@torch.no_grad()
def _denoise(model, steps, update, output_coords, input_coords, input_values, generator, on_step):
    shape = (*output_coords.shape[:2], input_values.shape[-1])
    x_t = _randn(shape, input_values, generator)
    # What does not change from step to step is worked out once, where a model offers that.
    once = dict(prepared=model.prepare(output_coords, input_coords, input_values)) if hasattr(model, "prepare") else {}
    for t, t_next in zip(steps, [*steps[1:], -1]):
        x_0 = model(x_t, output_coords, torch.full(shape[:1], t, device=x_t.device), input_coords, input_values, **once)
        x_t = update(x_t, x_0, t, t_next, _randn(shape, x_t, generator))
        if on_step:
            on_step(t, x_t, x_0)
    return x_t


def _randn(shape, like, generator):
    device = generator.device if generator else like.device
    return torch.randn(shape, generator=generator, device=device).to(like)


@torch.no_grad()
def one_step_mean(model, schedule, output_coords, input_coords, input_values, generator=None, chunk=1024):
    """The model's estimate of E[x_0 | x_in]: its prediction at the last timestep from pure noise, (B, N_out, C).

    At that timestep an output says nothing about the others, so any number of them is asked in chunks. The model is told
    so: pure_noise=True.
    """
    parts = []
    for coords in output_coords.split(chunk, dim=1):
        noise = _randn((*coords.shape[:2], input_values.shape[-1]), input_values, generator)
        t = torch.full(coords.shape[:1], schedule.num_timesteps - 1, device=coords.device)
        parts.append(model(noise, coords, t, input_coords, input_values, pure_noise=True))
    return torch.cat(parts, dim=1)


# ------------------------------------------------------------------------------------- alternatives and metrics


def nearest_pixel(output_coords, input_coords, input_values):
    """The value of the nearest input pixel: (B, N, 2), (B, N_in, 2), (B, N_in, C) -> (B, N, C)."""
    index = torch.cdist(output_coords, input_coords).argmin(dim=2, keepdim=True)
    return input_values.gather(1, index.expand(-1, -1, input_values.shape[-1]))


def inverse_distance(output_coords, input_coords, input_values, power=4):
    """Mean of all input pixels, weighted by distance^-power (Shepard, 1968). Shapes as in nearest_pixel."""
    weights = torch.cdist(output_coords, input_coords).clamp(min=1e-6) ** -power
    return weights / weights.sum(dim=2, keepdim=True) @ input_values


def psnr(mse):
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]; infinite for 0."""
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(a, b):
    """Structural similarity of images (B, C, H, W) in [0, 1], H and W at least 11: (B,). Wang et al. (2004), eq. 13.

    Local means and variances under a Gaussian window of 11 x 11, sigma 1.5, only where the window fits; mean over
    places and channels. ValueError for smaller images or different shapes.
    """
    if a.shape != b.shape or min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM wants two batches of the same shape, 11 x 11 at least: {tuple(a.shape)}, {tuple(b.shape)}")
    a, b = a.double(), b.double()  # a variance is a small difference of large numbers
    window = torch.exp(-((torch.arange(11, device=a.device, dtype=a.dtype) - 5) ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    channels = a.shape[1]

    def blur(x):  # a separable convolution: rows, then columns
        x = F.conv2d(x, window.view(1, 1, 11, 1).expand(channels, -1, -1, -1), groups=channels)
        return F.conv2d(x, window.view(1, 1, 1, 11).expand(channels, -1, -1, -1), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def reconstruct(model, schedule, images, keys, input_ratio=0.2, output_ratio=0.2, full=False, sampler="ddim",
                num_steps=50, eta=0.0, generator=None, on_step=None):
    """Every method's answer for a batch of images (B, C, H, W), masks from keys (B, H * W).

    Returns (split, outputs, answers): the sparse_split whose output is every pixel that is not input; how many of
    them, from the first, are the output pixels that count (all if full); and {method: (B, N, C)} for all of them. A
    sample is drawn jointly for the output pixels; what is left of the image is the one-step mean given input and sample.
    """
    asked = sparse_split(images[:1], input_ratio, None if full else output_ratio, keys=keys[:1])  # checks the ratios
    outputs, split = asked["output_indices"].shape[1], sparse_split(images, input_ratio, None, keys=keys)
    given, coords = (split["input_coords"], split["input_values"]), split["output_coords"]
    asked, rest = coords[:, :outputs], coords[:, outputs:]
    if sampler == "ddim":
        sample = ddim_sample(model, schedule, asked, *given, num_steps, eta, generator, on_step)
    else:
        sample = ddpm_sample(model, schedule, asked, *given, generator, on_step)
    if rest.shape[1]:
        known = torch.cat([given[0], asked], 1), torch.cat([given[1], sample.clamp(-1, 1)], 1)
        sample = torch.cat([sample, one_step_mean(model, schedule, rest, *known, generator)], 1)
    return split, outputs, {
        "one_step_mean": one_step_mean(model, schedule, coords, *given, generator),
        "sample": sample,
        "nearest": nearest_pixel(coords, *given),
        "inverse_distance": inverse_distance(coords, *given),
        "kriging": kriging(coords, *given),
    }


def evaluate_field(model, schedule, images, seed=0, batch=100, **options):
    """Every method on every image: {method: {"mse", "mae", "psnr", "ssim"}}, values in [0, 1], see `reconstruct`.

    images: uint8 (N, C, H, W); the mask of image i is a function of (seed, i). MSE and MAE are over the output pixels,
    after clamping, and PSNR is that of the mean MSE; SSIM is over whole images, input pixels kept.
    """
    generator, totals = torch.Generator().manual_seed(seed), {}
    for start in range(0, len(images), batch):
        part = images[start:start + batch]
        index = torch.arange(start, start + len(part), device=images.device)
        keys = fixed_keys(seed, index, part[0, 0].numel())
        split, outputs, answers = reconstruct(model, schedule, part, keys, generator=generator, **options)
        for name, values in answers.items():
            error = (values.clamp(-1, 1) - split["output_values"])[:, :outputs] / 2
            similarity = ssim(*(image / 2 + 0.5 for image in (whole(split, values), split["full_image"])))
            sums = torch.stack([error.square().mean((1, 2)), error.abs().mean((1, 2)), similarity]).sum(1)
            totals[name] = totals.get(name, 0) + sums.double()
    means = {name: (total / len(images)).tolist() for name, total in totals.items()}
    return {name: {"mse": mse, "mae": mae, "psnr": psnr(mse), "ssim": s} for name, (mse, mae, s) in means.items()}


@torch.no_grad()
def evaluate_samples(model, schedule, images, count, seed=0, input_ratio=0.2, num_steps=50, eta=0.0):
    """Is the spread of `count` DDIM samples an honest statement of doubt? images uint8 (N, C, H, W).

    Returns coverage, the share of output values within the samples' central 90% (of perfect samples 0.9; for a count of
    32 that is 29 / 33 = 0.88); spread, the samples' mean standard deviation; crps, the continuous ranked probability
    score mean |x - y| - mean |x - x'| / 2 (Gneiting & Raftery, 2007, eq. 21); psnr_mean, of the mean of the samples; all
    for values in [0, 1].
    """
    generator, sums = torch.Generator().manual_seed(seed), torch.zeros(4, dtype=torch.float64)
    for i, image in enumerate(images):
        keys = fixed_keys(seed, torch.tensor([i], device=images.device), image[0].numel())
        split = sparse_split(image[None], input_ratio, keys=keys)
        many = [split[name].expand(count, -1, -1) for name in ("output_coords", "input_coords", "input_values")]
        x = ddim_sample(model, schedule, *many, num_steps, eta, generator).clamp(-1, 1) / 2  # (count, N_out, C)
        y = split["output_values"][0] / 2
        # A value covered by the central 90% has between 5% and 95% of the samples below it.
        below = ((x < y).sum(0) + (x <= y).sum(0)) / (2 * count)
        ordered = x.sort(dim=0)[0]
        rank = (2 * torch.arange(1, count + 1, device=x.device) - count - 1)[:, None, None]
        apart = 2 * (rank * ordered).sum(0) / count**2  # mean |x - x'| over all pairs, from the order statistics
        sums += torch.stack([((below >= 0.05) & (below <= 0.95)).float().mean(), x.std(0).mean(),
                             ((x - y).abs().mean(0) - apart / 2).mean(), (x.mean(0) - y).square().mean()]).cpu()
    coverage, spread, crps, mse = (sums / len(images)).tolist()
    return dict(samples=count, images=len(images), coverage=coverage, spread=spread, crps=crps, psnr_mean=psnr(mse))


def whole(split, values):
    """The full image (B, C, H, W) in [-1, 1]: input pixels as they are, all others from values (B, N, C)."""
    image = scatter_pixels(split["output_indices"], values.clamp(-1, 1), split["full_image"].shape)
    return scatter_pixels(split["input_indices"], split["input_values"], image.shape, image)


@torch.no_grad()
def evaluate_autoencoder(model, images, seed=0):
    """{corruption: {"mse_before", "mse", "mae", "psnr", "ssim"}} against the clean images uint8 (N, 1, H, W).

    The corruptions are none and each of noise.NOISES at its default strength, the same noise for the same seed.
    """
    clean, results = images.float() / 255, {}
    for name, noisy in corruptions(clean, seed).items():
        restored = model(noisy)[0]
        mse = (restored - clean).square().mean().item()
        results[name] = {"mse_before": (noisy - clean).square().mean().item(), "mse": mse,
                         "mae": (restored - clean).abs().mean().item(), "psnr": psnr(mse),
                         "ssim": torch.cat(list(map(ssim, restored.split(200), clean.split(200)))).mean().item()}
    return results


def corruptions(clean, seed):
    """{name: clean images (N, ...) in [0, 1] under that corruption at its default strength}; noise drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    noisy = {name: add(clean.cpu(), strength, generator).to(clean) for name, (add, strength) in NOISES.items()}
    return {"clean": clean, **noisy}


def print_table(results, title):
    columns = list(next(iter(results.values())))
    heads = {"mse_before": "MSE before", "mse": "MSE", "mae": "MAE", "psnr": "PSNR dB", "ssim": "SSIM"}
    print(title)
    print(f"{'':18}" + "".join(f"{heads[c]:>12}" for c in columns))
    for name, row in results.items():
        print(f"{name.replace('_', ' '):18}" + "".join(f"{row[c]:12.{2 if c == 'psnr' else 5}f}" for c in columns))


# ------------------------------------------------------------------------------------------------------ pictures


def heat(error, limit=0.5):
    """Absolute error (C, H, W) as a heat map (3, H, W): black 0, red, yellow, white at `limit` and above."""
    level = 3 * (error.abs().mean(0) / limit).clamp(0, 1)
    return torch.stack([level.clamp(0, 1), (level - 1).clamp(0, 1), (level - 2).clamp(0, 1)])


def draw_field(split, answers):
    """Input pixels | kriging | one-step mean | sample | truth | absolute error of the one-step mean."""
    shape, truth = split["full_image"].shape, split["full_image"]
    dots = scatter_pixels(split["input_indices"], split["input_values"], shape)
    images = [whole(split, answers[name]) for name in ("kriging", "one_step_mean", "sample")]
    error = [heat((a - b) / 2) for a, b in zip(images[1], truth)]
    rows = [[*((image[i] + 1) / 2 for image in (dots, *images, truth)), error[i]] for i in range(len(truth))]
    captions = [["", *(f"{psnr((image[i] - truth[i]).square().mean().item() / 4):.1f} dB" for image in images), "",
                 "white: 0.5"] for i in range(len(truth))]
    labels = ["input pixels", "kriging", "one-step mean", "sample", "truth", "error of mean"]
    return image_grid(rows, labels, captions=captions)


def draw_autoencoder(model, images, seed):
    """Ten images: clean, then for each corruption noisy, reconstructed, and the error as a heat map."""
    clean = images[:10].float() / 255
    rows, labels = [], []
    with torch.no_grad():
        for name, noisy in corruptions(clean, seed).items():
            restored = model(noisy)[0]
            rows += [list(noisy), list(restored), [heat(e) for e in restored - clean]]
            labels += [name.replace("_", " "), "reconstructed", "abs. error"]
    return image_grid(rows, row_labels=labels, zoom=2)


def draw_spread(model, schedule, images, keys, args, generator, most=16):
    """Where is the field unsure? Mean and standard deviation of joint samples of whole images, beside the real error."""
    rows = []
    for image, key in zip(images, keys):
        count = min(most, args.samples)
        copies = image.expand(count, -1, -1, -1), key.expand(count, -1)
        split, _, answers = reconstruct(model, schedule, *copies, args.input_ratio[0], full=True,
                                        num_steps=args.steps, eta=args.eta, generator=generator)
        many, truth = (whole(split, answers["sample"]) + 1) / 2, (split["full_image"][0] + 1) / 2
        rows.append([*many[:3], many.mean(0), truth, heat(many.std(0), 0.25), heat(many.mean(0) - truth, 0.25)])
    samples = [f"sample {i + 1}" for i in range(min(3, args.samples))]
    return image_grid(rows, [*samples, "mean", "truth", "std. deviation", "error of mean"], zoom=3)


@torch.no_grad()
def draw_fine(model, schedule, split, scale, generator):
    """The field on a grid `scale` times as fine, beside kriging on that grid and the truth enlarged (bicubic)."""
    truth, given = split["full_image"], (split["input_coords"], split["input_values"])
    height, width = (n * scale for n in truth.shape[2:])
    axes = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).view(1, -1, 2).to(truth)  # (1, H * W, 2) as (x, y)
    coords = grid.expand(len(truth), -1, -1)
    smooth_field = torch.cat([kriging(part, *given) for part in coords.split(4096, dim=1)], dim=1)
    fields = [smooth_field, one_step_mean(model, schedule, coords, *given, generator)]
    fields = [(f.clamp(-1, 1) + 1).mT.unflatten(-1, (height, width)) / 2 for f in fields]
    dots = (scatter_pixels(split["input_indices"], split["input_values"], truth.shape) + 1) / 2
    dots = F.interpolate(dots, scale_factor=scale)
    smooth = F.interpolate((truth + 1) / 2, size=(height, width), mode="bicubic", align_corners=True)
    return image_grid([list(row) for row in zip(dots, *fields, smooth)],
                      ["input pixels", f"kriging x{scale}", f"field x{scale}", "truth, bicubic"], zoom=max(1, 6 // scale))


# ------------------------------------------------------------------------------------------------- command line


def load_checkpoint(path, device="cpu"):
    """A checkpoint of train.py, without running any code in it: (model with the averaged weights, the whole dict).

    Raises ValueError for a file that is no such checkpoint, OSError where it cannot be read.
    """
    file = open(path, "rb")
    try:
        with file, zipfile.ZipFile(file) as archive:  # torch would take a flipped bit for a weight
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        kind, config, weights = (checkpoint[key] for key in ("kind", "config", "ema"))
        missing = {"step", "data", "schedule"} - checkpoint.keys()
        if kind == "nf":
            missing |= {"input_channels", "side"} - config.keys()
            config = config | {name: weights[name] for name in ("alphas_cumprod", "spectrum")}
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        model = (NFDenoiser if kind == "nf" else DenoisingAutoencoder)(**config)
        model.load_state_dict(weights)
    except Exception as problem:  # a file that is something else, or damaged, can fail in any way
        reason = str(problem).strip().split("\n")[0][:120]
        raise ValueError(f"{path} is not a checkpoint of train.py ({type(problem).__name__}: {reason})") from None
    return model.to(device).eval(), checkpoint


def save_checkpoint(path, checkpoint):
    """Write to a temporary file, flush it to the disk, rename: the old checkpoint lives until the new one is whole."""
    temporary = path.with_suffix(".part")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as problem:  # what torch.save makes of a full disk
        raise OSError(f"cannot write {path}: {str(problem).splitlines()[0]}") from None
    finally:
        temporary.unlink(missing_ok=True)


def pick_device(name):
    """torch.device(name), if this machine has it: ValueError if not."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"--device {name} cannot be used: {str(problem).splitlines()[0]}") from None


def load_photo(path, side, channels):
    """Any picture as uint8 (1, channels, side, side): the middle square, resized. ValueError if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    except Exception as problem:  # Pillow's readers of damaged files can fail in any way
        raise ValueError(f"cannot use {path} as a picture: {problem}") from None
    return torch.from_numpy(np.array(image)).view(1, side, side, channels).permute(0, 3, 1, 2)


def report(model, checkpoint, images, folder, args, name):
    """Table, grid and the extras that the flags ask for. Returns {method: figures}."""
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint["kind"] != "nf":
        results = evaluate_autoencoder(model, images, args.seed)
        print_table(results, f"{checkpoint['kind']} on {name}, {len(images):,} images, noise seed {args.seed}")
        pictures = {"samples.png": draw_autoencoder(model, images, args.seed)}
    else:
        schedule = DiffusionSchedule(**checkpoint["schedule"]).to(images.device)
        options = dict(full=args.full, sampler=args.sampler, num_steps=args.steps, eta=args.eta)
        if len(args.input_ratio) > 1:  # one row a ratio: PSNR of every method
            table = {ratio: evaluate_field(model, schedule, images, args.seed, input_ratio=ratio, **options)
                     for ratio in args.input_ratio}
            print(f"PSNR in dB on {name}, {len(images):,} images, seed {args.seed}, by the share of pixels given\n      "
                  + "".join(f"{method.replace('_', ' '):>18}" for method in table[args.input_ratio[0]]))
            for ratio, row in table.items():
                print(f"{ratio:6.0%}" + "".join(f"{figures['psnr']:18.2f}" for figures in row.values()))
            return {f"{method} at {ratio:g}": figures for ratio, row in table.items() for method, figures in row.items()}
        options["input_ratio"] = args.input_ratio[0]
        results = evaluate_field(model, schedule, images, args.seed, **options)
        few, frames = images[:6], []
        keys = fixed_keys(args.seed, torch.arange(len(few), device=images.device), images[0, 0].numel())
        generator = torch.Generator().manual_seed(args.seed)
        split, outputs, answers = reconstruct(model, schedule, few, keys, generator=generator, **options,
                                              on_step=lambda t, x_t, x_0: frames.append((t, x_t, x_0)))
        n_in, pixels = split["input_indices"].shape[1], images[0, 0].numel()
        how = f"{args.sampler} {len(frames)} steps" + (f", eta {args.eta:g}" if args.sampler == "ddim" else "")
        print_table(results, f"nf on {name}, {len(images):,} images, {n_in} input and {outputs} output pixels of "
                             f"{pixels}, {how}, seed {args.seed}")
        pictures = {"samples.png": draw_field(split, answers)}
        if args.samples:
            results["samples"] = evaluate_samples(model, schedule, images, args.samples, args.seed, args.input_ratio[0],
                                                  args.steps, args.eta)
            print("{samples} samples of {images} images: {coverage:.1%} of the values within the central 90%, spread "
                  "{spread:.4f}, CRPS {crps:.4f}, PSNR of their mean {psnr_mean:.2f} dB".format(**results["samples"]))
            pictures["spread.png"] = draw_spread(model, schedule, images[:4], keys, args, generator)
        if args.scale > 1:
            pictures["scale.png"] = draw_fine(model, schedule, split, args.scale, generator)
        if args.gif:
            animate(split, outputs, frames, folder / "denoising.gif")
            print(f"animation: {folder / 'denoising.gif'}")
    for file, picture in pictures.items():
        picture.save(folder / file)
        print(f"picture: {folder / file}")
    return results


def write_json(path, figures):
    """Figures as JSON, which knows no infinity (the PSNR of a perfect answer): null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json.loads(json.dumps(figures), parse_constant=lambda _: None), indent=1) + "\n")


def animate(split, outputs, frames, path):
    """The field while it is denoised: x_t above, the prediction x_0_hat below, input pixels always in place."""
    shape, pictures = split["full_image"].shape, []
    given = scatter_pixels(split["input_indices"], split["input_values"], shape)
    for t, x_t, x_0 in frames[::max(1, len(frames) // 50)] + [frames[-1]] * 10:
        rows = [list(scatter_pixels(split["output_indices"][:, :outputs], v.clamp(-1, 1), shape, given) / 2 + 0.5)
                for v in (x_t, x_0)]
        pictures.append(image_grid(rows, [f"t = {t}"], ["x_t", "prediction"]))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, loop=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: the newest below --out, or the shipped one")
    parser.add_argument("--sampler", choices=["ddim", "ddpm"], default="ddim")
    parser.add_argument("--steps", type=int, help="of DDIM (default 50); DDPM walks all timesteps")
    parser.add_argument("--eta", type=float, default=0.0, help="randomness of DDIM, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the masks and the noise")
    parser.add_argument("--input-ratio", type=float, nargs="+", default=[0.2], help="share of the pixels that is given")
    parser.add_argument("--samples", type=int, metavar="K", help="draw K samples an image and measure their spread")
    parser.add_argument("--full", action="store_true", help="sample every missing pixel jointly")
    parser.add_argument("--scale", type=int, default=1, help="ask the field on a grid this many times as fine")
    parser.add_argument("--image", type=Path, help="a picture of your own instead of test images")
    parser.add_argument("--gif", action="store_true", help="animate the denoising")
    parser.add_argument("--evaluate", type=int, nargs="?", const=-1, metavar="N",
                        help="measure on the first N test images (default 1,000; all for the autoencoders)")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write a checkpoint of the averaged weights alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of the table to FILE")
    parser.add_argument("--data", choices=DATASETS, help="default: what the model was trained on")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are, or are put")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.error = fail
    args = parser.parse_args()
    args.device = pick_device(args.device)
    if args.sampler == "ddpm" and args.steps is not None:
        raise ValueError("--steps is for DDIM; DDPM walks all timesteps (--sampler ddim --eta 1 is DDPM in fewer steps)")
    for flag, value, good, want in (
            ("--eta", args.eta, 0 <= args.eta <= 1, "between 0 and 1"),
            ("--scale", args.scale, 1 <= args.scale <= 16, "between 1 and 16"),
            ("--samples", args.samples, args.samples is None or 2 <= args.samples <= 1000, "2 to 1000"),
            ("--seed", args.seed, 0 <= args.seed < 2**31, "between 0 and 2147483647"),
            ("--evaluate", args.evaluate, args.evaluate in (None, -1) or args.evaluate > 0, "at least 1")):
        if not good:
            raise ValueError(f"{flag} must be {want}, got {value}")

    path = args.checkpoint
    if path is None:
        found = sorted(args.out.rglob("checkpoint.pt"), key=lambda file: file.stat().st_mtime)
        if not found and not SHIPPED.exists():
            raise ValueError(f"no checkpoint below {args.out}: train one with `python train.py --model nf`")
        path = found[-1] if found else SHIPPED
    model, checkpoint = load_checkpoint(path, args.device)
    kind = checkpoint["kind"]
    print(f"{path}: {kind}, {checkpoint['step']:,} steps on {checkpoint['data']}")
    run_model = torch.compile(model) if args.compile else model
    extras = args.gif or args.scale > 1 or args.samples
    if kind != "nf" and (args.full or extras):
        raise ValueError(f"--full, --gif, --scale and --samples are for the neural field, and {path} is an autoencoder")
    if extras and len(args.input_ratio) > 1 or args.samples and args.sampler == "ddpm":
        raise ValueError("--gif, --scale and --samples want one --input-ratio, and --samples the DDIM sampler")
    if args.steps is None:
        args.steps = min(50, checkpoint["schedule"].get("timesteps", 50))

    if args.export:
        args.export.parent.mkdir(parents=True, exist_ok=True)
        small = {key: checkpoint[key] for key in ("kind", "config", "schedule", "data", "step", "ema")}
        # Weights in half precision: half the file, and less than 0.001 dB. (Not the buffers: alpha_bar_T would become 0.)
        weights = {name: p.half() for name, p in model.named_parameters()}
        save_checkpoint(args.export, {**small, "ema": {**small["ema"], **weights}})
        print(f"exported: {args.export}")

    start = time.time()
    channels, side = (checkpoint["config"]["input_channels"], checkpoint["config"]["side"]) if kind == "nf" else (1, 28)
    if args.image:
        name, images = args.image.name, load_photo(args.image, side, channels)
    else:
        wanted = args.data or ("auto" if path.resolve() == SHIPPED else checkpoint["data"])
        name, images, _ = load_dataset(wanted, args.data_dir, train=False, real="cifar10" if kind == "nf" else "mnist")
        if images.shape[1:] != (channels, side, side):
            raise ValueError(f"{path} wants images of {channels} x {side} x {side}, and {name} has "
                             f"{tuple(images.shape[1:])}")
        default = {None: 6, -1: min(1000, len(images))} if kind == "nf" else {None: len(images), -1: len(images)}
        count = default.get(args.evaluate, args.evaluate)
        if count > len(images):
            raise ValueError(f"--evaluate {count}: {name} has {len(images):,} test images")
        images = images[:count]
    results = report(run_model, checkpoint, images.to(args.device), args.out / kind, args, name)
    if args.json:
        figures = {"checkpoint": str(path), "data": name, "images": len(images), "seed": args.seed,
                   "samples": results.pop("samples", None), "methods": results}
        write_json(args.json, figures)
        print(f"figures: {args.json}")
    print(f"{time.time() - start:.0f} s on {args.device}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        fail(problem)
    except KeyboardInterrupt:
        raise SystemExit(130)
