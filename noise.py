"""Ways to corrupt an image, and measures of the damage.

A denoising autoencoder sees the corrupted image, and its loss compares the output with the clean
one: Vincent et al., "Stacked Denoising Autoencoders" (JMLR 2010), sections 3.1 and 3.3.

    python noise.py                 # three noises at five strengths: out/noise.png

Needs torch; the picture needs data.py, too.
"""
import math

import torch
import torch.nn.functional as F


def add_gaussian_noise(images, noise_factor=0.3, generator=None):
    """Add noise: clamp(images + noise_factor * eps, 0, 1), eps ~ N(0, 1) for each value.

    Every value is a little wrong. Errors of neighbours are independent, so averaging reduces them.
    images: float, any shape, in [0, 1]; returns a new tensor. noise_factor: the standard deviation,
    0 to 1,000,000, a number or a tensor that broadcasts to images. ValueError for other strengths.
    """
    check_noise(images, noise_factor, 1e6)
    eps = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return (images + noise_factor * eps).clamp(0, 1)


def add_salt_pepper_noise(images, noise_prob=0.2, generator=None):
    """Set a pixel to 0 or to 1, each with probability noise_prob / 2 (in 0 to 1).

    Most pixels are untouched, those that are hit keep nothing, and a network has to find out which
    they are. In (B, C, H, W) all channels of a pixel change together; else each value is a pixel.
    Otherwise like add_gaussian_noise.
    """
    check_noise(images, noise_prob, 1)
    u = uniform_per_pixel(images, generator)  # 0 to 1, one number for all channels of a pixel
    salted = images.masked_fill(u < noise_prob, 1)
    return salted.masked_fill(u < noise_prob / 2, 0)


def add_masking_noise(images, mask_prob=0.3, generator=None):
    """Set a pixel to 0 with probability mask_prob. Otherwise like add_salt_pepper_noise.

    To fill the holes, a network must learn how pixels depend on each other. The first denoising
    autoencoder was trained on this noise: Vincent et al. (ICML 2008).
    """
    check_noise(images, mask_prob, 1)
    u = uniform_per_pixel(images, generator)
    return images.masked_fill(u < mask_prob, 0)


def psnr(mse):
    """Peak signal-to-noise ratio in dB of values in [0, 1]: -10 log10(mse), at most 100.

    10 dB more is a tenth of the mean squared error. mse: a number, at least 0.
    """
    return -10 * math.log10(max(mse, 1e-10))


# ============== below: SSIM, mixed noise, random numbers, checks, command line, picture
def ssim(a, b):
    """Structural similarity of images (B, C, H, W) in [0, 1]: (B,). Wang et al. (2004), eq. 13.

    It compares means, variances and covariance in windows of 11 x 11 (Gaussian, sigma 1.5, no
    padding), so lost texture costs more than in PSNR. 1: equal. Mean over windows and channels.
    Raises RuntimeError for images below 11 x 11 or of different shapes.
    """
    gaussian = torch.signal.windows.gaussian(11, std=1.5, dtype=torch.float64)
    window = torch.outer(gaussian, gaussian) / gaussian.sum() ** 2
    # in float64, since a variance is a small difference of large numbers; some devices lack it
    a, b = a.cpu().double(), b.cpu().double()
    maps = torch.stack([a, b, a * a, b * b, a * b])  # (5, B, C, H, W)
    averages = F.conv2d(maps.flatten(0, 2)[:, None], window[None, None])
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = averages.view(5, len(a), -1)  # each (B, windows)
    var_a = mean_aa - mean_a**2
    var_b = mean_bb - mean_b**2
    covariance = mean_ab - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2  # keep the ratios finite where an image is black or flat
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(1)


def add_mixed_noise(images, generator=None):
    """Corrupt each image with one of the three noises, each at its own random strength.

    A network trained on it cannot rely on one kind or one amount of damage. Strengths are uniform:
    Gaussian 0.1 to 0.5, salt and pepper 0.05 to 0.4, masking 0.1 to 0.6. images: float (B, ...).
    Raises ValueError for integers.
    """
    one_per_image = (len(images), *[1] * (images.dim() - 1))
    u = torch.rand(one_per_image, generator=generator, device=images.device).to(images.dtype)
    kind = torch.randint(3, one_per_image, generator=generator, device=images.device)
    gaussian = add_gaussian_noise(images, 0.1 + 0.4 * u, generator)
    salt_pepper = add_salt_pepper_noise(images, 0.05 + 0.35 * u, generator)
    masked = add_masking_noise(images, 0.1 + 0.5 * u, generator)
    mixed = torch.where(kind == 0, gaussian, salt_pepper)
    return torch.where(kind == 2, masked, mixed)


# name on the command line: (function, default strength)
NOISES = {
    "gaussian": (add_gaussian_noise, 0.3),
    "salt_pepper": (add_salt_pepper_noise, 0.2),
    "masking": (add_masking_noise, 0.3),
}


def uniform_per_pixel(images, generator):
    """Uniform in [0, 1): (B, 1, H, W) for images (B, C, H, W), else of the images' shape."""
    pixels = images[:, :1] if images.dim() == 4 else images
    return torch.rand(pixels.shape, generator=generator, device=images.device)


def check_noise(images, strength, highest):
    if not torch.is_floating_point(images):
        raise ValueError(f"images must be float in [0, 1], got {images.dtype}: divide by 255")
    strength = torch.as_tensor(strength)
    if not ((strength >= 0) & (strength <= highest)).all():
        raise ValueError(f"a noise's strength must be 0 to {highest:g}, got "
                         f"{strength.min():g} to {strength.max():g}")


def main():
    from data import image_grid, make_glyphs, make_parser, save_pictures
    args = make_parser(__doc__).parse_args()
    clean = make_glyphs(1, seed=0)[0][0] / 255  # (1, 28, 28)
    strengths = 0.1, 0.2, 0.3, 0.4, 0.5
    rows, captions = [], []
    for add_noise, _ in NOISES.values():
        row, caption = [clean], ["clean"]
        for strength in strengths:
            noisy = add_noise(clean, strength, torch.Generator().manual_seed(0))
            mse = (noisy - clean).square().mean().item()
            row.append(noisy)
            caption.append(f"{strength}: {psnr(mse):.1f} dB")
        rows.append(row)
        captions.append(caption)
    grid = image_grid(rows, row_labels=list(NOISES), captions=captions)
    save_pictures(args.out, {"noise.png": grid})


if __name__ == "__main__":
    from data import run
    run(main)
