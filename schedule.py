"""The arithmetic of diffusion: how clean data becomes noise, and how to take one step back.

Forward process   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,    eps ~ N(0, I)
                  alpha_t = 1 - beta_t,   alpha_bar_t = alpha_0 alpha_1 ... alpha_t
Reverse process   a network predicts x_0 from x_t; ddim_step or ddpm_step turns the prediction
                  into x at an earlier, less noisy timestep

Timesteps run from 0 (almost clean) to T - 1 (almost pure noise). t = -1 stands for clean data,
where alpha_bar = 1.

    python schedule.py                     # beta_t, alpha_bar_t and x_t's weights: out/schedule.png
    python schedule.py --timesteps 100

Papers: DDPM (Ho et al., 2020, arXiv 2006.11239), DDIM (Song et al., 2021, arXiv 2010.02502),
Improved DDPM (Nichol & Dhariwal, 2021, arXiv 2102.09672). This file needs only torch and Pillow:
copy it anywhere.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont


def cosine_beta_schedule(timesteps, s=0.008):
    """Betas for which alpha_bar follows a squared cosine. Improved DDPM, eq. 17.

    timesteps: T, 1 to 10,000. s: an offset that keeps the first betas from being tiny.
    Returns float64 (T,), clipped to [0.0001, 0.9999]. Raises ValueError for another T.
    """
    _check_timesteps(timesteps)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0.0001, 0.9999)


def linear_beta_schedule(timesteps, beta_start=0.0001, beta_end=0.02):
    """Betas on a straight line. DDPM, section 4.

    timesteps: T, 1 to 10,000. Returns float64 (T,), from beta_start to beta_end.
    Raises ValueError for another T and for betas outside (0, 1).
    """
    _check_timesteps(timesteps)
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"betas must lie between 0 and 1, got {beta_start} to {beta_end}")
    return torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)


def _check_timesteps(timesteps):
    if not 1 <= timesteps <= 10_000:
        raise ValueError(f"a schedule needs 1 to 10,000 timesteps, got {timesteps}")


class DiffusionSchedule:
    """The constants of a noise schedule, and the steps that use them.

    timesteps: T, 1 to 10,000. beta_schedule: "cosine" or "linear". Each constant is a float64
    tensor (T,). In all methods a timestep is an int, or an int64 tensor (B,) with one entry for
    each item of the batch, and x_0, x_t and noise are float (B, ...) of one shape, which is also
    that of the result. Raises ValueError for another T or beta_schedule; the methods raise
    IndexError for an int timestep out of range.
    """

    def __init__(self, timesteps=1000, beta_schedule="cosine"):
        if beta_schedule not in ("cosine", "linear"):
            raise ValueError(f"beta_schedule must be cosine or linear, got {beta_schedule!r}")
        make_betas = cosine_beta_schedule if beta_schedule == "cosine" else linear_beta_schedule
        self.num_timesteps = timesteps
        self.betas = make_betas(timesteps)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones_like(self.betas[:1]),
                                              self.alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.sqrt_recip_alphas_cumprod = (1 / self.alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()
        # eq. 7 of DDPM; 0 at t = 0, so the logarithm is clipped there
        self.posterior_variance = (self.betas * (1 - self.alphas_cumprod_prev)
                                   / (1 - self.alphas_cumprod))
        self.posterior_log_variance = self.posterior_variance.clamp(min=1e-20).log()

    def to(self, device):
        """Move the constants to `device` (as float32 to "mps", which has no float64)."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
                setattr(self, name, value.to(device, dtype))
        return self

    def q_sample(self, x_0, t, noise):
        """Noisy data x_t from clean data x_0. DDPM, eq. 4; noise: N(0, I)."""
        x_t = (_at(self.sqrt_alphas_cumprod, t, x_0) * x_0
               + _at(self.sqrt_one_minus_alphas_cumprod, t, x_0) * noise)
        return x_t.to(x_0.dtype)

    def predict_eps(self, x_t, t, x_0):
        """The noise in x_t if x_0 is the clean data: DDPM, eq. 4, solved for eps."""
        eps = ((_at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x_0)
               / _at(self.sqrt_recipm1_alphas_cumprod, t, x_t))
        return eps.to(x_t.dtype)

    def ddim_step(self, x_t, x_0, t, t_next, eta=0.0, noise=None):
        """From timestep t to any earlier t_next, given the predicted x_0. DDIM, eq. 12.

        t_next: below t; -1 is clean data. eta: 0 is deterministic; 1 with t_next = t - 1 is DDPM.
        noise: N(0, I); drawn here if it is None and eta > 0.
        """
        alpha_bar = _at(self.alphas_cumprod, t, x_t)
        alpha_bar_next = _at(self.alphas_cumprod_prev, t_next + 1, x_t)  # 1 for t_next = -1
        eps = self.predict_eps(x_t, t, x_0)
        # eq. 16 of DDIM
        sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar)
                       * (1 - alpha_bar / alpha_bar_next)).sqrt()
        # eq. 12: predicted x_0, direction pointing to x_t, random noise
        direction = (1 - alpha_bar_next - sigma**2).clamp(min=0).sqrt() * eps
        x_next = alpha_bar_next.sqrt() * x_0 + direction
        if eta > 0:
            x_next = x_next + sigma * (torch.randn_like(x_t) if noise is None else noise)
        return x_next.to(x_t.dtype)

    def ddpm_step(self, x_t, x_0, t, noise=None):
        """From t to t - 1: a draw from q(x_{t-1} | x_t, x_0). DDPM, eq. 6 and 7.

        noise: N(0, I); drawn here if it is None. At t = 0 the variance is 0 and the result x_0.
        """
        beta, alpha = _at(self.betas, t, x_t), _at(self.alphas, t, x_t)
        alpha_bar = _at(self.alphas_cumprod, t, x_t)
        alpha_bar_prev = _at(self.alphas_cumprod_prev, t, x_t)
        posterior_mean = (alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * x_0
                          + alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar) * x_t)
        noise = torch.randn_like(x_t) if noise is None else noise
        x_prev = posterior_mean + _at(self.posterior_variance, t, x_t).sqrt() * noise
        return x_prev.to(x_t.dtype)

    def timesteps(self, num_steps):
        """Timesteps to sample at: int64 (num_steps,), falling, evenly spread from T - 1 to 0.

        A single step is at T - 1. Raises ValueError for num_steps outside 1..T.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"the number of sampling steps must be 1 to {self.num_timesteps}, "
                             f"got {num_steps}")
        spread = torch.linspace(self.num_timesteps - 1, 0, num_steps, dtype=torch.float64)
        return spread.round().long()


def _at(constant, t, x):
    """constant[t] with the dimensions it needs to multiply x: () or (B, 1, ..., 1)."""
    if isinstance(t, int) and not 0 <= t < len(constant):
        raise IndexError(f"timestep out of range: a schedule has {len(constant)} of them")
    value = constant[t]
    return value if value.dim() == 0 else value.view(-1, *[1] * (x.dim() - 1))


COLOURS = ["#1f6fb4", "#d1481f", "#2b9348", "#8a4fbf", "#b8860b", "#555555"]


def line_chart(title, curves, size=(460, 320), log_y=False):
    """A line chart as a PIL image.

    curves: {label: (xs, ys)}, sequences of finite numbers; with log_y the ys must be positive.
    """
    (width, height), left, right, top, bottom = size, 62, 24, 30, 30
    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=12)
    draw = ImageDraw.Draw(image)
    scale = math.log10 if log_y else float
    points = {label: [(float(x), scale(y)) for x, y in zip(*curve)]
              for label, curve in curves.items()}
    all_x, all_y = zip(*(point for curve in points.values() for point in curve))
    x_low, y_low = min(all_x), min(all_y)
    x_span, y_span = (max(all_x) - x_low) or 1.0, (max(all_y) - y_low) or 1.0

    def place(x, y):
        return (left + (x - x_low) / x_span * (width - left - right),
                height - bottom - (y - y_low) / y_span * (height - top - bottom))

    draw.text((left, 8), title, fill="black", font=font)
    for i in range(5):
        x, y = x_low + i / 4 * x_span, y_low + i / 4 * y_span
        draw.line([place(x_low, y), place(x_low + x_span, y)], fill="#e4e4e4")
        value = 10**y if log_y else y if abs(y) > 1e-3 * y_span else 0
        draw.text((left - 6, place(x, y)[1]), f"{value:.4g}", fill="#444", font=font, anchor="rm")
        draw.text((place(x, y)[0], height - bottom + 6), f"{x:.4g}", fill="#444", font=font,
                  anchor="ma")
    for i, (label, curve) in enumerate(points.items()):
        colour = COLOURS[i % len(COLOURS)]
        draw.line([place(x, y) for x, y in curve], fill=colour, width=2, joint="curve")
        draw.text((width - right, height // 2 + 15 * i), label, fill=colour, font=font,
                  anchor="ra")
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timesteps", type=int, default=1000, help="T, length of the diffusion")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()

    schedules = {name: DiffusionSchedule(args.timesteps, name) for name in ("cosine", "linear")}
    t = range(args.timesteps)
    betas = {name: (t, s.betas.tolist()) for name, s in schedules.items()}
    alpha_bars = {name: (t, s.alphas_cumprod.tolist()) for name, s in schedules.items()}
    weights = {}
    for name, s in schedules.items():
        weights[f"{name}: weight of x_0"] = (t, s.sqrt_alphas_cumprod.tolist())
        weights[f"{name}: weight of eps"] = (t, s.sqrt_one_minus_alphas_cumprod.tolist())
    charts = [line_chart("beta_t", betas, log_y=True), line_chart("alpha_bar_t", alpha_bars),
              line_chart("x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps", weights)]
    picture = Image.new("RGB", (3 * 460, 320))
    for i, chart in enumerate(charts):
        picture.paste(chart, (i * 460, 0))
    args.out.mkdir(parents=True, exist_ok=True)
    picture.save(args.out / "schedule.png")
    for name, s in schedules.items():
        print(f"{name}: beta {s.betas[0]:.6f} to {s.betas[-1]:.6f}, "
              f"alpha_bar {s.alphas_cumprod[0]:.6f} to {s.alphas_cumprod[-1]:.3g}")
    print(f"picture: {args.out / 'schedule.png'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
