"""Four ways to spoil an image, for denoising autoencoders.

Gaussian          y = clamp(x + factor * eps, 0, 1),  eps ~ N(0, 1)
Salt and pepper   a pixel becomes 0 or 1, each with probability prob / 2
Masking           a pixel becomes 0 with probability prob
Mixed             every image gets one of the three, at a random strength ("blind" denoising)

A denoising autoencoder learns to undo them: the spoilt image goes in, and the loss compares what comes out with the
clean one. After Vincent et al., "Stacked Denoising Autoencoders" (JMLR 2010), section 3.3.

    python noise.py                 # a gallery, noise kinds down, strengths across: out/noise.png

This file needs nothing but torch, numpy and Pillow: copy it anywhere.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def add_gaussian_noise(images, noise_factor=0.3, generator=None):
    """Add white Gaussian noise and clamp to [0, 1]. Vincent et al. (2010), section 3.3.

    images: float tensor of any shape in [0, 1], never modified. noise_factor: standard deviation >= 0, a number or a
    tensor that broadcasts over the images. Returns a new tensor like images. Raises ValueError for a negative factor.
    """
    noise_factor = _check(images, noise_factor, "noise_factor", math.inf)
    eps = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return (images + noise_factor * eps).clamp(0, 1)


def add_salt_pepper_noise(images, noise_prob=0.2, generator=None):
    """Turn a pixel black or white, each with probability noise_prob / 2. Vincent et al. (2010), section 3.3.

    images: float tensor in [0, 1], never modified; in a (B, C, H, W) tensor a pixel's channels share one fate, in any
    other shape every value is a pixel. noise_prob: in [0, 1], a number or a tensor that broadcasts.
    Returns a new tensor like images. Raises ValueError for a probability outside [0, 1].
    """
    noise_prob = _check(images, noise_prob, "noise_prob", 1)
    u = _one_draw_per_pixel(images, generator)
    return torch.where(u < noise_prob / 2, 0.0, torch.where(u < noise_prob, 1.0, images))


def add_masking_noise(images, mask_prob=0.3, generator=None):
    """Set a pixel to 0 with probability mask_prob. Vincent et al. (2010), section 3.3.

    Shapes, ranges and errors as in add_salt_pepper_noise.
    """
    mask_prob = _check(images, mask_prob, "mask_prob", 1)
    return torch.where(_one_draw_per_pixel(images, generator) < mask_prob, 0.0, images)


def add_mixed_noise(images, generator=None):
    """Give every image one of the three noises, at a random strength, so that a model must find out which.

    images: (B, ...) float in [0, 1], never modified. Strengths are uniform: Gaussian 0.1 to 0.5, salt and pepper 0.05
    to 0.4, masking 0.1 to 0.6. Returns a new tensor like images. Raises ValueError for an unbatched tensor.
    """
    if images.dim() < 2:
        raise ValueError(f"mixed noise wants a batch of images (B, ...), got shape {tuple(images.shape)}")
    per_image = (len(images), *[1] * (images.dim() - 1))
    strength = torch.rand(per_image, generator=generator, device=images.device)
    kind = torch.randint(3, per_image, generator=generator, device=images.device)
    gaussian = add_gaussian_noise(images, 0.1 + 0.4 * strength, generator)
    salt_pepper = add_salt_pepper_noise(images, 0.05 + 0.35 * strength, generator)
    masked = add_masking_noise(images, 0.1 + 0.5 * strength, generator)
    return torch.where(kind == 0, gaussian, torch.where(kind == 1, salt_pepper, masked))


def _check(images, strength, name, highest):
    if not torch.is_floating_point(images):
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}: divide bytes by 255 first")
    if not isinstance(strength, torch.Tensor):
        if not 0 <= strength <= highest or math.isinf(strength):
            raise ValueError(f"{name} must be {'at least 0' if highest > 1 else 'between 0 and 1'}, got {strength}")
    elif not bool(((strength >= 0) & (strength <= highest)).all()):
        raise ValueError(f"{name} holds values below 0 or above {highest}")
    return strength


def _one_draw_per_pixel(images, generator):
    shape = (len(images), 1, *images.shape[2:]) if images.dim() == 4 else images.shape
    return torch.rand(shape, generator=generator, device=images.device)


NOISES = {  # name on the command line: (function, default strength)
    "gaussian": (add_gaussian_noise, 0.3),
    "salt_pepper": (add_salt_pepper_noise, 0.2),
    "masking": (add_masking_noise, 0.3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.error = fail
    args = parser.parse_args()
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed must be between 0 and 2147483647, got {args.seed}")
    generator = torch.Generator().manual_seed(args.seed)

    # A clean image to spoil: one big digit, 28 x 28, drawn with the font that Pillow carries.
    digit = Image.new("L", (28, 28))
    ImageDraw.Draw(digit).text((14, 14), "8", fill=255, font=ImageFont.load_default(size=26), anchor="mm")
    clean = torch.from_numpy(np.array(digit, dtype=np.float32) / 255)

    strengths, cell, left, top, caption = [0.1, 0.2, 0.3, 0.4, 0.5], 112, 90, 24, 18
    font = ImageFont.load_default(size=13)
    size = (left + (cell + 6) * (len(strengths) + 1), top + (cell + caption + 6) * len(NOISES))
    gallery = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(gallery)
    for row, (name, (corrupt, _)) in enumerate(NOISES.items()):
        y = top + row * (cell + caption + 6)
        draw.text((6, y + cell / 2), name, fill="black", font=font, anchor="lm")
        for column, strength in enumerate([0.0, *strengths]):
            x = left + column * (cell + 6)
            noisy = corrupt(clean, strength, generator)
            mse = float((noisy - clean).square().mean())
            tile = Image.fromarray((noisy * 255).round().to(torch.uint8).numpy())
            gallery.paste(tile.resize((cell, cell), Image.Resampling.NEAREST).convert("RGB"), (x, y))
            psnr = f"{-10 * math.log10(mse):.1f} dB" if mse > 0 else "clean"
            draw.text((x + cell / 2, y + cell + 2), psnr, fill="#444", font=font, anchor="ma")
            if row == 0:
                draw.text((x + cell / 2, 5), f"{strength:g}", fill="black", font=font, anchor="ma")
    args.out.mkdir(parents=True, exist_ok=True)
    gallery.save(args.out / "noise.png")
    print(f"picture: {args.out / 'noise.png'} (noise kinds down, strengths across, PSNR under each)")


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        fail(problem)
