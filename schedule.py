"""The arithmetic of diffusion: how a clean value becomes noise, and one step back.

Forward process   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)
                  alpha_t = 1 - beta_t,   alpha_bar_t = alpha_0 alpha_1 ... alpha_t
Reverse process   a network predicts x_0 from x_t ("x0-prediction"); ddim_step or ddpm_step turn that
                  prediction into x at an earlier, less noisy timestep.

Timesteps run from 0 (almost clean) to T - 1 (almost pure noise); -1 stands for clean data, alpha_bar = 1.

    python schedule.py                    # draws beta_t, alpha_bar_t and the mixing coefficients: out/schedule.png
    python schedule.py --timesteps 100

Papers: DDPM (Ho et al., 2020, arXiv 2006.11239), DDIM (Song et al., 2021, arXiv 2010.02502), Improved DDPM
(Nichol & Dhariwal, 2021, arXiv 2102.09672). This file needs nothing but torch and Pillow: copy it anywhere.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont


def cosine_beta_schedule(timesteps, s=0.008):
    """Betas whose alpha_bar follows a squared cosine. Improved DDPM, eq. 17.

    timesteps: T >= 1; s: small offset that keeps the first betas from vanishing.
    Returns float64 (T,), clipped to [0.0001, 0.9999]. Raises ValueError for timesteps < 1.
    """
    _check_timesteps(timesteps)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0.0001, 0.9999)


def linear_beta_schedule(timesteps, beta_start=0.0001, beta_end=0.02):
    """Betas that rise in a straight line. DDPM, section 4.

    Returns float64 (T,), from beta_start to beta_end. Raises ValueError for timesteps < 1 or betas outside (0, 1).
    """
    _check_timesteps(timesteps)
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"betas must lie between 0 and 1, got {beta_start} to {beta_end}")
    return torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)


def _check_timesteps(timesteps):
    if not 1 <= timesteps <= 1_000_000:
        raise ValueError(f"a schedule needs 1 to 1,000,000 timesteps, got {timesteps}")


class DiffusionSchedule:
    """All constants of one noise schedule, and the steps that use them.

    Every constant is a float32 tensor (T,), worked out in float64. A timestep `t` is an int or an int64 tensor (B,)
    with one entry per item of the batch; x_0, x_t and noise are (B, ...) of any further shape.
    Raises ValueError for timesteps outside 1..1,000,000 or an unknown beta_schedule, IndexError for an int t outside
    -1..T-1.
    """

    def __init__(self, timesteps=1000, beta_schedule="cosine"):
        if beta_schedule not in ("cosine", "linear"):
            raise ValueError(f"beta_schedule must be 'cosine' or 'linear', got {beta_schedule!r}")
        betas = cosine_beta_schedule(timesteps) if beta_schedule == "cosine" else linear_beta_schedule(timesteps)
        self.num_timesteps = timesteps
        self.beta_schedule = beta_schedule

        alphas = 1 - betas
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        alpha_bar = log_alpha_bar.exp()
        one = torch.ones(1, dtype=torch.float64)
        alpha_bar_prev = torch.cat([one, alpha_bar[:-1]])
        variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)  # eq. 7 of DDPM; 0 at t = 0

        constants = {
            "betas": betas,
            "alphas": alphas,
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": alpha_bar_prev,
            "sqrt_alphas_cumprod": alpha_bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance": variance.clamp(min=1e-20).log(),
            # Entry t + 1 is log(alpha_bar_t), so that t = -1 finds log(1) = 0. Steps work with the logarithm because
            # 1 - alpha_bar loses its digits in float32 where alpha_bar is near 1, and -expm1(log alpha_bar) does not.
            "_log_alpha_bar": torch.cat([0 * one, log_alpha_bar]),
        }
        self._names = list(constants)
        for name, value in constants.items():
            setattr(self, name, value.float())

    def to(self, device):
        """Move every constant to `device`; returns the schedule itself."""
        for name in self._names:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def _log_at(self, t, like):
        """log(alpha_bar_t), shaped to multiply `like`: () for an int t, (B, 1, ..., 1) for a tensor t."""
        if isinstance(t, int) and not -1 <= t < self.num_timesteps:
            raise IndexError(f"timestep {t} is outside -1 to {self.num_timesteps - 1}")
        value = self._log_alpha_bar[t + 1]
        return value if value.dim() == 0 else value.view(-1, *[1] * (like.dim() - 1))

    def q_sample(self, x_0, t, noise):
        """Jump from clean data straight to timestep t. DDPM, eq. 4."""
        log_bar = self._log_at(t, x_0)
        return (log_bar / 2).exp() * x_0 + (-torch.expm1(log_bar)).sqrt() * noise

    def predict_eps(self, x_t, t, x_0):
        """The noise that would lead from x_0 to x_t; q_sample solved for it. DDIM, eq. 9, the other way round."""
        log_bar = self._log_at(t, x_t)
        return (x_t - (log_bar / 2).exp() * x_0) / (-torch.expm1(log_bar)).sqrt()

    def ddim_step(self, x_t, x_0, t, t_next, eta=0.0, noise=None):
        """From timestep t to an earlier t_next, given the predicted x_0. DDIM, eq. 12, sigma from eq. 16.

        t_next: any timestep below t, or -1 for clean data. eta: 0 is deterministic; 1 on consecutive timesteps is
        DDPM. noise: the N(0, I) that sigma multiplies; drawn here if it is None and eta > 0.
        """
        log_bar, log_next = self._log_at(t, x_t), self._log_at(t_next, x_t)
        one_minus_bar, one_minus_next = -torch.expm1(log_bar), -torch.expm1(log_next)
        # eq. 16: sigma^2 = eta^2 (1 - alpha_bar_next) / (1 - alpha_bar) (1 - alpha_bar / alpha_bar_next)
        variance = eta**2 * one_minus_next / one_minus_bar * -torch.expm1(log_bar - log_next)
        eps = self.predict_eps(x_t, t, x_0)
        # eq. 12: predicted x_0 + direction that points to x_t (what sigma adds is left out of it) + noise
        x_next = (log_next / 2).exp() * x_0 + (one_minus_next - variance).clamp(min=0).sqrt() * eps
        if eta > 0:
            x_next = x_next + variance.sqrt() * (torch.randn_like(x_t) if noise is None else noise)
        return x_next

    def ddpm_step(self, x_t, x_0, t, noise=None):
        """From t to t - 1 by a draw from the posterior q(x_{t-1} | x_t, x_0). DDPM, eq. 6 and 7.

        noise: N(0, I), drawn here if None; at t = 0 the variance is 0 and the result is x_0.
        """
        log_bar, log_prev = self._log_at(t, x_t), self._log_at(t - 1, x_t)
        one_minus_bar, one_minus_prev = -torch.expm1(log_bar), -torch.expm1(log_prev)
        beta = -torch.expm1(log_bar - log_prev)
        mean = (log_prev / 2).exp() * beta / one_minus_bar * x_0
        mean = mean + ((log_bar - log_prev) / 2).exp() * one_minus_prev / one_minus_bar * x_t
        variance = beta * one_minus_prev / one_minus_bar
        return mean + variance.sqrt() * (torch.randn_like(x_t) if noise is None else noise)

    def timesteps(self, num_steps):
        """`num_steps` timesteps to sample at: int64 (num_steps,), descending, evenly spread from T - 1 to 0.

        One step alone is T - 1. Raises ValueError for num_steps outside 1..T.
        """
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"the number of sampling steps must be 1 to {self.num_timesteps}, got {num_steps}")
        return torch.linspace(self.num_timesteps - 1, 0, num_steps, dtype=torch.float64).round().long()


COLOURS = ["#1f6fb4", "#d1481f", "#2b9348", "#8a4fbf", "#b8860b", "#555555"]


def line_chart(title, curves, size=(460, 320), log_y=False):
    """A line chart as a PIL image. curves: {label: (xs, ys)} with sequences of finite numbers; log_y wants ys > 0."""
    width, height = size
    left, right, top, bottom = 62, 24, 30, 30
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    scale = (lambda y: math.log10(max(y, 1e-12))) if log_y else float
    xs = [float(x) for curve in curves.values() for x in curve[0]]
    ys = [scale(y) for curve in curves.values() for y in curve[1]]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    x_span, y_span = (x_high - x_low) or 1.0, (y_high - y_low) or 1.0

    def place(x, y):
        return (left + (x - x_low) / x_span * (width - left - right),
                height - bottom - (y - y_low) / y_span * (height - top - bottom))

    draw.text((left, 8), title, fill="black", font=font)
    for i in range(5):
        x, y = x_low + i / 4 * x_span, y_low + i / 4 * y_span
        draw.line([place(x_low, y), place(x_high, y)], fill="#e4e4e4")
        value = 10**y if log_y else y if abs(y) > 1e-4 * y_span else 0
        draw.text((left - 6, place(x_low, y)[1]), f"{value:.3g}", fill="#444", font=font, anchor="rm")
        draw.text((place(x, y_low)[0], height - bottom + 6), f"{x:.4g}", fill="#444", font=font, anchor="ma")
    for i, (label, (curve_x, curve_y)) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [place(float(x), scale(y)) for x, y in zip(curve_x, curve_y)]
        draw.line(points, fill=colour, width=2, joint="curve")
        draw.text((width - right - 4, top + 4 + 15 * i), label, fill=colour, font=font, anchor="ra")
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=1000, help="T, the length of the diffusion")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.error = fail
    args = parser.parse_args()

    schedules = {name: DiffusionSchedule(args.timesteps, name) for name in ("cosine", "linear")}
    t = range(args.timesteps)
    charts = [
        line_chart("beta_t", {name: (t, s.betas.tolist()) for name, s in schedules.items()}, log_y=True),
        line_chart("alpha_bar_t", {name: (t, s.alphas_cumprod.tolist()) for name, s in schedules.items()}),
        line_chart("x_t = a x_0 + b eps", {f"{letter} {name}": (t, getattr(s, constant).tolist())
                                          for name, s in schedules.items() for letter, constant in
                                          (("a", "sqrt_alphas_cumprod"), ("b", "sqrt_one_minus_alphas_cumprod"))}),
    ]
    picture = Image.new("RGB", (sum(c.width for c in charts), charts[0].height), "white")
    for i, chart in enumerate(charts):
        picture.paste(chart, (i * chart.width, 0))
    args.out.mkdir(parents=True, exist_ok=True)
    picture.save(args.out / "schedule.png")

    print(f"{'t':>6}" + "".join(f"{name + ' beta':>14}{name + ' abar':>14}" for name in schedules))
    for i in sorted({0, *[args.timesteps * k // 4 for k in (1, 2, 3)], args.timesteps - 1}):
        print(f"{i:6d}" + "".join(f"{s.betas[i]:14.6f}{s.alphas_cumprod[i]:14.6f}" for s in schedules.values()))
    print(f"picture: {args.out / 'schedule.png'}")


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        fail(problem)
