"""The arithmetic of diffusion: how clean data becomes noise, and how to undo it step by step.

Forward process   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,    eps ~ N(0, I)
                  alpha_t = 1 - beta_t,   alpha_bar_t = alpha_0 alpha_1 ... alpha_t
Reverse process   a network predicts x_0 from x_t; ddim_step or ddpm_step makes x_t less noisy
Timesteps         0 (almost clean) to T - 1 (almost pure noise); -1: clean data, alpha_bar = 1

    python schedule.py                     # alpha_bar_t of both schedules: out/schedule.png

DDPM: Ho et al. (2020, arXiv 2006.11239). DDIM: Song et al. (2021, arXiv 2010.02502). Improved
DDPM: Nichol & Dhariwal (2021, arXiv 2102.09672). Needs only torch and Pillow: copy it anywhere.
"""
import argparse
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw


def cosine_beta_schedule(timesteps, s=0.008):
    """Betas for which alpha_bar follows a squared cosine. Improved DDPM, eq. 17.

    timesteps: T, 1 to 10,000. s: an offset that keeps the first betas from being tiny.
    Returns float64 (T,), clipped to [0.0001, 0.9999]. Raises ValueError for a T out of range.
    """
    _check_timesteps(timesteps)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0.0001, 0.9999)


def linear_beta_schedule(timesteps, beta_start=0.0001, beta_end=0.02):
    """Betas on a straight line from beta_start to beta_end, both in (0, 1). DDPM, section 4.

    timesteps: T, 1 to 10,000. Returns float64 (T,). Raises ValueError for values out of range.
    """
    _check_timesteps(timesteps)
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"betas must lie between 0 and 1, got {beta_start} to {beta_end}")
    return torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)


def _check_timesteps(timesteps):
    if not 1 <= timesteps <= 10_000:
        raise ValueError(f"a schedule needs 1 to 10,000 timesteps, got {timesteps}")


class DiffusionSchedule:
    """The constants of a noise schedule, float64 tensors (T,), and the steps that use them.

    timesteps: T, 1 to 10,000. beta_schedule: "cosine" or "linear". Raises ValueError for others.
    x_0, x_t, noise and the results are float (B, ...) of one shape; noise is N(0, I), drawn by a
    step if it is None. A timestep is an int (IndexError out of range) or an int64 tensor (B,).
    """

    def __init__(self, timesteps=1000, beta_schedule="cosine"):
        make_betas = {"cosine": cosine_beta_schedule, "linear": linear_beta_schedule}
        if beta_schedule not in make_betas:
            raise ValueError(f"beta_schedule must be cosine or linear, got {beta_schedule!r}")
        self.num_timesteps = timesteps
        self.betas = make_betas[beta_schedule](timesteps)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.sqrt_recip_alphas_cumprod = (1 / self.alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()
        self.posterior_variance = (self.betas * (1 - self.alphas_cumprod_prev)
                                   / (1 - self.alphas_cumprod))  # eq. 7 of DDPM; 0 at t = 0
        self.posterior_log_variance = self.posterior_variance.clamp(min=1e-20).log()

    def to(self, device):
        """Move the constants to `device` (as float32 to "mps", which has no float64)."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device, dtype))
        return self

    def q_sample(self, x_0, t, noise):
        """Noisy data x_t from clean data x_0. DDPM, eq. 4."""
        return (_at(self.sqrt_alphas_cumprod, t, x_0) * x_0
                + _at(self.sqrt_one_minus_alphas_cumprod, t, x_0) * noise).to(x_0.dtype)

    def predict_eps(self, x_t, t, x_0):
        """The noise in x_t if x_0 is the clean data: DDPM, eq. 4, solved for eps."""
        return ((_at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - x_0)
                / _at(self.sqrt_recipm1_alphas_cumprod, t, x_t)).to(x_t.dtype)

    def ddim_step(self, x_t, x_0, t, t_next, eta=0.0, noise=None):
        """From timestep t to any earlier t_next, given the predicted x_0. DDIM, eq. 12 and 16.

        t_next: below t; -1 is clean data. eta: 0 is deterministic; 1 with t_next = t - 1 is DDPM.
        """
        alpha_bar = _at(self.alphas_cumprod, t, x_t)
        alpha_bar_next = _at(self.alphas_cumprod_prev, t_next + 1, x_t)  # 1 if t_next = -1
        sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar)  # eq. 16
                       * (1 - alpha_bar / alpha_bar_next)).sqrt()
        # eq. 12: predicted x_0, direction pointing to x_t, random noise
        direction = (1 - alpha_bar_next - sigma**2).clamp(min=0).sqrt()
        x_next = alpha_bar_next.sqrt() * x_0 + direction * self.predict_eps(x_t, t, x_0)
        if eta > 0:
            x_next = x_next + sigma * (torch.randn_like(x_t) if noise is None else noise)
        return x_next.to(x_t.dtype)

    def ddpm_step(self, x_t, x_0, t, noise=None):
        """From t to t - 1 (x_0 at t = 0): a draw from q(x_{t-1} | x_t, x_0). DDPM, eq. 6 and 7."""
        beta, alpha = _at(self.betas, t, x_t), _at(self.alphas, t, x_t)
        alpha_bar = _at(self.alphas_cumprod, t, x_t)
        alpha_bar_prev = _at(self.alphas_cumprod_prev, t, x_t)
        posterior_mean = (alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * x_0
                          + alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar) * x_t)
        noise = torch.randn_like(x_t) if noise is None else noise
        return (posterior_mean + _at(self.posterior_variance, t, x_t).sqrt() * noise).to(x_t.dtype)

    def timesteps(self, num_steps):
        """int64 (num_steps,), evenly spread from T - 1 to 0. Raises ValueError for 0 or above T."""
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"sampling steps must be 1 to {self.num_timesteps}, got {num_steps}")
        steps = torch.linspace(self.num_timesteps - 1, 0, num_steps, dtype=torch.float64)
        return steps.round().long()


def _at(constant, t, x):
    """constant[t] with the dimensions it needs to multiply x: () or (B, 1, ..., 1)."""
    if isinstance(t, int) and not 0 <= t < len(constant):
        raise IndexError(f"timestep out of range: a schedule has {len(constant)} of them")
    value = constant[t]
    return value if value.dim() == 0 else value.view(-1, *[1] * (x.dim() - 1))


@torch.no_grad()
def ddim_sample(model, schedule, output_coords, input_coords, input_values, num_steps=50, eta=0.0,
                generator=None, on_step=None):
    """Denoise Gaussian noise at output_coords step by step. DDIM, eq. 12.

    model(x_t, output_coords, t, input_coords, input_values) -> x_0_hat. output_coords
    (B, N_out, 2), input_coords (B, N_in, 2), input_values (B, N_in, C) in [-1, 1]. eta: 0 is
    deterministic given the initial noise, 1 adds as much noise as DDPM. on_step(t, x_t, x_0_hat)
    is called before each step. Returns (B, N_out, C), not clamped. Raises ValueError for num_steps
    outside 1..T or eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    timesteps = schedule.timesteps(num_steps).tolist()
    x_t = _randn(output_coords, input_values, generator)
    for t, t_next in zip(timesteps, [*timesteps[1:], -1]):
        t_batch = torch.full((len(x_t),), t, device=x_t.device)
        x_0 = model(x_t, output_coords, t_batch, input_coords, input_values)
        if on_step:
            on_step(t, x_t, x_0)
        noise = _randn(output_coords, input_values, generator)
        x_t = schedule.ddim_step(x_t, x_0, t, t_next, eta, noise)
    return x_t


@torch.no_grad()
def ddpm_sample(model, schedule, output_coords, input_coords, input_values, generator=None,
                on_step=None):
    """Ancestral sampling over all T timesteps. DDPM, algorithm 2. Otherwise like ddim_sample."""
    x_t = _randn(output_coords, input_values, generator)
    for t in reversed(range(schedule.num_timesteps)):
        t_batch = torch.full((len(x_t),), t, device=x_t.device)
        x_0 = model(x_t, output_coords, t_batch, input_coords, input_values)
        if on_step:
            on_step(t, x_t, x_0)
        noise = _randn(output_coords, input_values, generator)
        x_t = schedule.ddpm_step(x_t, x_0, t, noise)
    return x_t


def _randn(coords, values, generator):
    """N(0, 1) for each of coords (B, N, 2) and channel of values (B, M, C): (B, N, C)."""
    device = generator.device if generator else values.device
    shape = *coords.shape[:2], values.shape[2]
    return torch.randn(shape, generator=generator, device=device).to(values)


def line_chart(title, curves):
    """A 460 x 320 Pillow image. curves: {label: (xs, ys)}, finite numbers."""
    all_x, all_y = (sum((list(curve[i]) for curve in curves.values()), []) for i in (0, 1))
    x_low, x_span = min(all_x), (max(all_x) - min(all_x)) or 1
    y_low, y_span = min(all_y), (max(all_y) - min(all_y)) or 1
    image = Image.new("RGB", (460, 320), "white")
    draw = ImageDraw.Draw(image)
    draw.text((62, 8), title, "black", font_size=12)
    for part in (0, 0.25, 0.5, 0.75, 1):  # grid lines and numbers on the axes
        x, y = 62 + 374 * part, 290 - 260 * part
        draw.line([(62, y), (436, y)], fill="#e4e4e4")
        number = round(float(y_low + part * y_span), 9)
        draw.text((56, y), f"{number:.3g}", "#444", font_size=12, anchor="rm")
        draw.text((x, 296), f"{x_low + part * x_span:.4g}", "#444", font_size=12, anchor="ma")
    for i, (label, curve) in enumerate(curves.items()):
        colour = ("#1f6fb4", "#d1481f", "#2b9348", "#8a4fbf")[i % 4]
        points = [(62 + 374 * (x - x_low) / x_span, 290 - 260 * (y - y_low) / y_span)
                  for x, y in zip(*curve)]
        draw.line(points, fill=colour, width=2, joint="curve")
        draw.circle(points[-1], 3, colour)
        draw.text((436 - 110 * i, 8), label, colour, font_size=12, anchor="ra")
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timesteps", type=int, default=1000, help="T, length of the diffusion")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()
    curves = {}
    for name in ("cosine", "linear"):
        schedule = DiffusionSchedule(args.timesteps, name)
        curves[name] = range(args.timesteps), schedule.alphas_cumprod.tolist()
        print(f"{name}: alpha_bar from {curves[name][1][0]:.4f} down to {curves[name][1][-1]:.3g}")
    args.out.mkdir(parents=True, exist_ok=True)
    line_chart("alpha_bar_t", curves).save(args.out / "schedule.png")
    print(f"picture: {args.out / 'schedule.png'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
