"""Four ways to corrupt an image, for denoising autoencoders.

Gaussian          y = clamp(x + noise_factor * eps, 0, 1),   eps ~ N(0, 1)
Salt and pepper   a pixel becomes 0 or 1, each with probability noise_prob / 2
Masking           a pixel becomes 0 with probability mask_prob
Mixed             each image gets one of the three at a random strength ("blind" denoising)

A denoising autoencoder sees the corrupted image, and its loss compares the output with the clean
one. After Vincent et al., "Stacked Denoising Autoencoders" (JMLR 2010), section 3.3.

    python noise.py                 # the three noises at five strengths: out/noise.png

This file needs only torch, numpy and Pillow: copy it anywhere.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def add_gaussian_noise(images, noise_factor=0.3, generator=None):
    """Add white Gaussian noise and clamp to [0, 1].

    images: float tensor of any shape in [0, 1]; it is not modified. noise_factor: standard
    deviation, 0 to 1,000,000; a number, or a tensor that broadcasts to the images.
    Returns a new tensor of the same shape. Raises ValueError for another factor and
    for images that are not floating point.
    """
    _check(images, noise_factor, "noise_factor", 1e6)
    eps = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return (images + noise_factor * eps).clamp(0, 1)


def add_salt_pepper_noise(images, noise_prob=0.2, generator=None):
    """Set a pixel to 0 or to 1, each with probability noise_prob / 2.

    images: float tensor in [0, 1]; it is not modified. In a (B, C, H, W) tensor all channels of a
    pixel change together; in any other shape every value is a pixel of its own.
    noise_prob: in [0, 1]; a number, or a tensor that broadcasts to the images.
    Returns a new tensor of the same shape. Raises ValueError for a probability outside [0, 1] and
    for images that are not floating point.
    """
    _check(images, noise_prob, "noise_prob", 1)
    u = _uniform_per_pixel(images, generator)
    return torch.where(u < noise_prob / 2, 0.0, torch.where(u < noise_prob, 1.0, images))


def add_masking_noise(images, mask_prob=0.3, generator=None):
    """Set a pixel to 0 with probability mask_prob.

    Shapes, ranges and errors as in add_salt_pepper_noise.
    """
    _check(images, mask_prob, "mask_prob", 1)
    return torch.where(_uniform_per_pixel(images, generator) < mask_prob, 0.0, images)


def add_mixed_noise(images, generator=None):
    """Corrupt each image with one of the three noises, at a strength of its own.

    images: (B, ...) float in [0, 1]; it is not modified. The strength is uniform: Gaussian 0.1 to
    0.5, salt and pepper 0.05 to 0.4, masking 0.1 to 0.6.
    Returns a new tensor of the same shape. Raises ValueError for a tensor without a batch
    dimension and for images that are not floating point.
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
    values = torch.as_tensor(strength)
    if not ((values >= 0) & (values <= highest)).all():
        raise ValueError(f"{name} must be between 0 and {highest:g}, got {values.min():g} to "
                         f"{values.max():g}")


def _uniform_per_pixel(images, generator):
    shape = (len(images), 1, *images.shape[2:]) if images.dim() == 4 else images.shape
    return torch.rand(shape, generator=generator, device=images.device)


NOISES = {  # name on the command line: (function, default strength)
    "gaussian": (add_gaussian_noise, 0.3),
    "salt_pepper": (add_salt_pepper_noise, 0.2),
    "masking": (add_masking_noise, 0.3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed % 2**32)

    # A clean image: the digit 8 in the font that Pillow ships, 28 x 28.
    image = Image.new("L", (28, 28))
    font = ImageFont.load_default(size=26)
    ImageDraw.Draw(image).text((14, 14), "8", fill=255, font=font, anchor="mm")
    clean = torch.from_numpy(np.array(image)).float() / 255

    strengths = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    cell, left, font = 130, 90, ImageFont.load_default(size=13)
    picture = Image.new("RGB", (left + cell * len(strengths), cell * len(NOISES)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (name, (add_noise, _)) in enumerate(NOISES.items()):
        draw.text((6, row * cell + 56), name, fill="black", font=font, anchor="lm")
        for column, strength in enumerate(strengths):
            noisy = add_noise(clean, strength, generator)
            tile = Image.fromarray((noisy * 255).round().byte().numpy())
            x, y = left + column * cell, row * cell
            picture.paste(tile.resize((112, 112), Image.Resampling.NEAREST), (x, y))
            mse = (noisy - clean).square().mean().item()
            label = f"{strength:g}: {-10 * math.log10(mse):.1f} dB" if mse else "clean"
            draw.text((x + 56, y + 114), label, fill="black", font=font, anchor="ma")
    args.out.mkdir(parents=True, exist_ok=True)
    picture.save(args.out / "noise.png")
    print(f"picture: {args.out / 'noise.png'} (strength and PSNR under each image)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
