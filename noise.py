"""Four ways to corrupt an image: Gaussian noise, salt and pepper, masking, one of them at random;
and two measures of the damage, PSNR and SSIM.

A denoising autoencoder sees the corrupted image, and its loss compares the output with the clean
one: Vincent et al., "Stacked Denoising Autoencoders" (JMLR 2010), section 3.3.

    python noise.py                 # the three noises at five strengths: out/noise.png

This file needs only torch, numpy and Pillow: copy it anywhere.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw


def add_gaussian_noise(images, noise_factor=0.3, generator=None):
    """Add white Gaussian noise: clamp(images + noise_factor * eps, 0, 1), eps ~ N(0, 1).

    images: float tensor of any shape in [0, 1]; it is not modified. noise_factor: standard
    deviation, 0 to 1,000,000; a number, or a tensor that broadcasts to the images.
    Returns a new tensor of the same shape. Raises ValueError for a factor out of range or integers.
    """
    _check(images, noise_factor, "noise_factor", 1e6)
    eps = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return (images + noise_factor * eps).clamp(0, 1)


def add_salt_pepper_noise(images, noise_prob=0.2, generator=None):
    """Set a pixel to 0 or to 1, each with probability noise_prob / 2.

    images: float tensor in [0, 1]; it is not modified. In a (B, C, H, W) tensor all channels of a
    pixel change together; in any other shape every value is a pixel of its own.
    noise_prob: 0 to 1; a number, or a tensor that broadcasts to the images. Returns a new tensor
    of the same shape. Raises ValueError for a probability out of range or integer images.
    """
    _check(images, noise_prob, "noise_prob", 1)
    u = _uniform_per_pixel(images, generator)
    return torch.where(u < noise_prob / 2, 0.0, torch.where(u < noise_prob, 1.0, images))


def add_masking_noise(images, mask_prob=0.3, generator=None):
    """Set a pixel to 0 with probability mask_prob. Otherwise like add_salt_pepper_noise."""
    _check(images, mask_prob, "mask_prob", 1)
    return torch.where(_uniform_per_pixel(images, generator) < mask_prob, 0.0, images)


def add_mixed_noise(images, generator=None):
    """Corrupt each image with one of the three noises, each at its own random strength.

    images: float (B, ...) in [0, 1]; it is not modified. Strengths are uniform: Gaussian 0.1 to
    0.5, salt and pepper 0.05 to 0.4, masking 0.1 to 0.6. Returns a new tensor of the same shape.
    Raises ValueError for images without a batch dimension and for integer images.
    """
    if images.dim() < 2:
        raise ValueError(f"mixed noise needs a batch (B, ...), got shape {tuple(images.shape)}")
    per_image = (len(images), *[1] * (images.dim() - 1))
    strength = torch.rand(per_image, generator=generator, device=images.device).to(images.dtype)
    kind = torch.randint(3, per_image, generator=generator, device=images.device)
    gaussian = add_gaussian_noise(images, 0.1 + 0.4 * strength, generator)
    salt_pepper = add_salt_pepper_noise(images, 0.05 + 0.35 * strength, generator)
    masked = add_masking_noise(images, 0.1 + 0.5 * strength, generator)
    return torch.where(kind == 0, gaussian, torch.where(kind == 1, salt_pepper, masked))


def _check(images, strength, name, highest):
    if not torch.is_floating_point(images):
        raise ValueError(f"images must be float in [0, 1], got {images.dtype}: divide by 255")
    given = torch.as_tensor(strength)
    if not ((given >= 0) & (given <= highest)).all():
        raise ValueError(f"{name} must be 0 to {highest:g}, got {given.min():g} to {given.max():g}")


def _uniform_per_pixel(images, generator):
    shape = (len(images), 1, *images.shape[2:]) if images.dim() == 4 else images.shape
    return torch.rand(shape, generator=generator, device=images.device)


def psnr(mse):
    """Peak signal-to-noise ratio in dB, -10 log10(mse), of values in [0, 1]; at most 100."""
    return -10 * math.log10(max(mse, 1e-10))


def ssim(a, b):
    """Structural similarity of images (B, C, H, W) in [0, 1]: (B,). Wang et al. (2004), eq. 13.

    Gaussian window of 11 x 11, sigma 1.5, without padding; mean over positions and channels.
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


# name on the command line: (function, default strength)
NOISES = {"gaussian": (add_gaussian_noise, 0.3), "salt_pepper": (add_salt_pepper_noise, 0.2),
          "masking": (add_masking_noise, 0.3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed % 2**32)

    digit = Image.new("L", (28, 28))
    ImageDraw.Draw(digit).text((14, 14), "8", fill=255, font_size=26, anchor="mm")
    clean = torch.from_numpy(np.array(digit)).float() / 255
    picture = Image.new("RGB", (650, 390), "white")
    draw = ImageDraw.Draw(picture)
    for y, (name, (add_noise, _)) in zip(range(0, 390, 130), NOISES.items()):
        for x, strength in zip(range(0, 650, 130), (0.1, 0.2, 0.3, 0.4, 0.5)):
            noisy = add_noise(clean, strength)
            tile = Image.fromarray((noisy * 255).round().byte().numpy())
            picture.paste(tile.resize((112, 112), Image.Resampling.NEAREST), (x, y))
            decibels = psnr((noisy - clean).square().mean().item())
            draw.text((x, y + 113), f"{name} {strength}: {decibels:.1f} dB", "black", font_size=11)
    args.out.mkdir(parents=True, exist_ok=True)
    picture.save(args.out / "noise.png")
    print(f"picture: {args.out / 'noise.png'} (strength and PSNR under each image)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
