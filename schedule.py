"""The arithmetic of diffusion: how clean data becomes noise, and how to undo it step by step.

One step  x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) eps,   alpha_t = 1 - beta_t,   eps ~ N(0, I)
At once   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, alpha_bar_t = alpha_0...alpha_t
Reverse   a network predicts x_0 from x_t; ddim_step or ddpm_step makes x_t less noisy
Timesteps 0 (almost clean) to T - 1 (almost pure noise), -1: clean data; the papers count from 1

    python schedule.py                     # alpha_bar_t of both schedules: out/schedule.png

DDPM: Ho et al. (2020, arXiv 2006.11239). DDIM: Song et al. (2021, arXiv 2010.02502). Improved
DDPM: Nichol & Dhariwal (2021, arXiv 2102.09672). Needs torch; the picture needs data.py, too.
"""
import math

import torch
import torch.nn.functional as F


def cosine_beta_schedule(timesteps, s=0.008):
    """Betas for which alpha_bar follows a squared cosine. Improved DDPM, eq. 17.

    DDPM's linear betas make the last fifth of the steps almost pure noise; here all lose signal.
    s and the clamp (paper: to 0.999) keep betas from being tiny and alpha_bar, a divisor, above 0.
    timesteps: T, 1 to 10,000. Returns float64 (T,). Raises ValueError for another T.
    """
    check_timesteps(timesteps)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]  # 1 - alpha_t
    return betas.clamp(0.0001, 0.9999)


class DiffusionSchedule:
    """The constants of a noise schedule, float64 tensors (T,), and the steps that use them.

    timesteps: T, 1 to 10,000. beta_schedule: "cosine" or "linear". Raises ValueError for others.
    x_0, x_t, noise and the results: float (B, ...) of one shape. t, t_next: an int (IndexError if
    out of range) or a tensor (B,), int64 or float (rounded down).
    """

    def __init__(self, timesteps=1000, beta_schedule="cosine"):
        make_betas = {"cosine": cosine_beta_schedule, "linear": linear_beta_schedule}
        if beta_schedule not in make_betas:
            raise ValueError(f"beta_schedule must be cosine or linear, got {beta_schedule!r}")
        betas = make_betas[beta_schedule](timesteps)
        self.timesteps = timesteps  # T
        self.betas = betas          # variance of the noise that step t adds
        self.alphas = 1 - betas     # share of the variance that it keeps
        self.alphas_cumprod = alpha_bar = self.alphas.cumprod(0)  # share kept by steps 0 to t
        self.alphas_cumprod_prev = alpha_bar_prev = F.pad(alpha_bar[:-1], (1, 0), value=1.0)
        # x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps
        self.sqrt_alphas_cumprod = alpha_bar.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alpha_bar).sqrt()
        # solved for x_0: x_0 = sqrt(1 / alpha_bar) x_t - sqrt(1 / alpha_bar - 1) eps
        self.sqrt_recip_alphas_cumprod = (1 / alpha_bar).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / alpha_bar - 1).sqrt()
        # posterior, x_{t-1} given x_t and x_0: N(coef_x_0 x_0 + coef_x_t x_t, variance), eq. 6, 7
        self.posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        self.posterior_log_variance = self.posterior_variance.clamp(min=1e-20).log()
        self.posterior_mean_coef_x_0 = alpha_bar_prev.sqrt() * betas / (1 - alpha_bar)
        self.posterior_mean_coef_x_t = self.alphas.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)

    def to(self, device):
        """Move the constants to `device` (as float32 to "mps", which has no float64)."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device, dtype))
        return self

    def q_sample(self, x_0, t, noise):
        """Noisy data x_t from clean data x_0, in one go for any t. DDPM, eq. 4."""
        t = as_index(t, x_0, self.timesteps)  # (B or 1, 1, ..., 1), for constants[t] * x_0
        x_t = self.sqrt_alphas_cumprod[t] * x_0 + self.sqrt_one_minus_alphas_cumprod[t] * noise
        return x_t.to(x_0.dtype)

    def predict_eps(self, x_t, t, x_0_hat):
        """The noise in x_t if x_0_hat is the clean data: DDPM, eq. 4, solved for eps."""
        t = as_index(t, x_t, self.timesteps)
        scaled_eps = self.sqrt_recip_alphas_cumprod[t] * x_t - x_0_hat
        return (scaled_eps / self.sqrt_recipm1_alphas_cumprod[t]).to(x_t.dtype)

    def ddim_step(self, x_t, x_0_hat, t, t_next, eta=0.0, noise=None):
        """From timestep t to any earlier t_next, given the prediction x_0_hat. DDIM, eq. 12.

        The prediction splits x_t into x_0_hat and eps_hat; their sum with the weights of t_next is
        x_next. Only the two noise levels matter: timesteps between them can be left out. t_next =
        -1: clean data. eta = 0 adds no new noise; eta = 1 with t_next = t - 1 is ddpm_step: the
        same mean, the same variance. noise: N(0, I), needed if eta is not 0.
        """
        eps_hat = self.predict_eps(x_t, t, x_0_hat)
        alpha_bars = F.pad(self.alphas_cumprod, (0, 1), value=1.0)  # alpha_bars[-1]: clean data
        alpha_bar = alpha_bars[as_index(t, x_t, self.timesteps)]
        alpha_bar_next = alpha_bars[as_index(t_next, x_t, self.timesteps, lowest=-1)]
        # eq. 16, squared (alpha_t there is alpha_bar_t here): the variance of the new noise
        new = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
        # the old noise makes up the rest: together they have the variance 1 - alpha_bar_next
        old = (1 - alpha_bar_next - new).clamp(min=0)
        x_next = alpha_bar_next.sqrt() * x_0_hat + old.sqrt() * eps_hat
        if eta > 0:
            x_next = x_next + new.sqrt() * noise
        return x_next.to(x_t.dtype)

    def ddpm_step(self, x_t, x_0_hat, t, noise):
        """From t to t - 1 (clean data at t = 0), given the prediction x_0_hat. DDPM, eq. 6, 7.

        A draw from q(x_{t-1} | x_t, x_0), which Bayes' rule gives: a Gaussian whose mean is a
        weighted sum of x_0_hat and x_t. noise: N(0, I), or 0 for the mean.
        """
        t = as_index(t, x_t, self.timesteps)
        mean = self.posterior_mean_coef_x_0[t] * x_0_hat + self.posterior_mean_coef_x_t[t] * x_t
        return (mean + self.posterior_variance[t].sqrt() * noise).to(x_t.dtype)


@torch.no_grad()
def ddim(denoise, schedule, x_T, num_steps=50, eta=0.0, generator=None, on_step=None):
    """From pure noise x_T ~ N(0, I), (B, ...), to data in num_steps steps. DDIM, section 4.2.

    denoise(x_t, t) -> x_0_hat for x_t (B, ...) and t int64 (B,). eta: as in ddim_step; `generator`
    may be on another device. on_step(t, x_t, x_0_hat), if given, is called before each step.
    Returns (B, ...), not clamped. Raises ValueError for num_steps outside 1..T, eta outside [0, 1].
    """
    check_steps_and_eta(num_steps, schedule.timesteps, eta)
    timesteps = torch.linspace(schedule.timesteps - 1, 0, num_steps, dtype=torch.float64)
    timesteps = timesteps.round().int().tolist()  # evenly from T - 1 to 0
    x_t = x_T
    for t, t_next in zip(timesteps, [*timesteps[1:], -1]):  # the last step leads to clean data
        x_0_hat = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
        if on_step:
            on_step(t, x_t, x_0_hat)
        noise = normal_like(x_t, generator) if eta > 0 else None
        x_t = schedule.ddim_step(x_t, x_0_hat, t, t_next, eta, noise)
    return x_t


@torch.no_grad()
def ddpm(denoise, schedule, x_T, generator=None, on_step=None):
    """All T timesteps, all but the last with new noise. DDPM, algorithm 2. Else like ddim."""
    x_t = x_T
    for t in reversed(range(schedule.timesteps)):
        x_0_hat = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
        if on_step:
            on_step(t, x_t, x_0_hat)
        noise = normal_like(x_t, generator) if t > 0 else 0
        x_t = schedule.ddpm_step(x_t, x_0_hat, t, noise)
    return x_t


# ============= below: linear betas, indexing, random numbers, checks, command line, picture
def linear_beta_schedule(timesteps, beta_start=0.0001, beta_end=0.02):
    """Betas on a straight line from beta_start to beta_end. DDPM, section 4.

    The two ends are for 1,000 steps. Fewer steps must add as much noise in total, so betas are
    multiplied by 1000 / T, as in the code of Improved DDPM.
    timesteps: T, 1 to 10,000; both ends in (0, 1). Returns float64 (T,). Raises ValueError for
    other values.
    """
    check_timesteps(timesteps)
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"betas must lie between 0 and 1, got {beta_start} to {beta_end}")
    betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
    return (betas * 1000 / timesteps).clamp(max=0.9999)


def as_index(t, x, timesteps, lowest=0):
    """t as int64 (B or 1, 1, ..., 1), so that constant[t] multiplies items of x (B, ...)."""
    if isinstance(t, int) and not lowest <= t < timesteps:
        raise IndexError(f"t must be {lowest} or more and below {timesteps}, got {t}")
    t = torch.as_tensor(t, device=x.device).long()
    return t.view(-1, *[1] * (x.dim() - 1))


def normal_like(x, generator=None):
    """N(0, I) with the shape, dtype and device of x, drawn on the generator's device."""
    device = generator.device if generator else x.device
    return torch.randn(x.shape, generator=generator, device=device).to(x)


def check_timesteps(timesteps):
    if not 1 <= timesteps <= 10_000:
        raise ValueError(f"a schedule needs 1 to 10,000 timesteps, got {timesteps}")


def check_steps_and_eta(num_steps, timesteps, eta):
    if not 1 <= num_steps <= timesteps:
        raise ValueError(f"sampling steps must be 1 to {timesteps}, got {num_steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")


def main():
    from data import line_chart, make_parser, save_pictures
    parser = make_parser(__doc__)
    parser.add_argument("--timesteps", type=int, default=1000, help="T, length of the diffusion")
    args = parser.parse_args()
    curves = {}
    for name in ("cosine", "linear"):
        alpha_bar = DiffusionSchedule(args.timesteps, name).alphas_cumprod.tolist()
        curves[name] = range(args.timesteps), alpha_bar
        print(f"{name}: alpha_bar from {alpha_bar[0]:.4f} down to {alpha_bar[-1]:.3g}")
    save_pictures(args.out, {"schedule.png": line_chart("alpha_bar_t", curves)})


if __name__ == "__main__":
    from data import run
    run(main)
