"""A neural field as a denoiser: a Perceiver IO that turns scattered pixels into a function of position.

An image is a set of pixels (coordinate, value). Some are given, clean and fixed (the input); others start as Gaussian
noise and are denoised step by step (the output). The network predicts the clean output values in one go:

    x_0_hat = f(x_t_out, coords_out, t, coords_in, x_in),        loss = mean (x_0_hat - x_0)^2

It has two parts. The first is exact and has no weights: if images were Gaussian random fields, the best prediction
E[x_0 | x_t, x_in] would be linear algebra (GaussianField, below). The second is a Perceiver IO that learns the rest,
what makes an image more than a random field:

    encoder    learned latents read all pixels          cross-attention
    processor  the latents talk to each other           self-attention, num_blocks times
    decoder    every queried pixel reads the latents    cross-attention

    python nf_denoiser.py                  # parameters, FLOPs, images per second, share of the matmul rate
    python nf_denoiser.py --size full

Papers: Perceiver IO (Jaegle et al., 2021, arXiv 2107.14795); DDPM (Ho et al., 2020, arXiv 2006.11239); Fourier
features (Tancik et al., 2020, arXiv 2006.10739). This file needs nothing but torch: copy it anywhere.
"""
import argparse
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SIZES = {  # what `--size` means; everything else is NFDenoiser's default
    "full": dict(num_latents=512, latent_dim=512, num_fourier_feats=256, num_blocks=6, num_heads=8, dropout=0.1),
    "small": dict(num_latents=32, latent_dim=64, num_fourier_feats=32, num_blocks=1, num_heads=2, dropout=0.0,
                  stencil_dim=256),
}


class FourierFeatures(nn.Module):
    """Coordinates as waves: gamma(v) = [sin(2 pi B v), cos(2 pi B v)]. Tancik et al. (2020), eq. 5.

    (..., 2) coordinates in [0, 1] -> (..., 2 * num_feats). B is Gaussian with standard deviation `scale` (cycles per
    image side), fixed once drawn, and saved with the weights.
    """

    def __init__(self, num_feats, scale=4.0):
        super().__init__()
        self.register_buffer("B", torch.randn(2, num_feats) * scale)

    def forward(self, coords):
        # Not a matrix product: under bf16 autocast that would round the angles to a tenth of a turn.
        angle = 2 * math.pi * (coords[..., :1] * self.B[0] + coords[..., 1:] * self.B[1])
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class SinusoidalTimeEmbedding(nn.Module):
    """Timesteps as waves of geometrically falling frequency. Transformer (Vaswani et al., 2017), section 3.5.

    (B,) timesteps, whole or not -> (B, dim) float in [-1, 1]. Raises ValueError for a dim that is not even.
    """

    def __init__(self, dim):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"the time embedding needs an even dim of at least 2, got {dim}")
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2)))

    def forward(self, t):
        angle = t[:, None].float() * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention softmax(Q K^T / sqrt(d)) V from x (B, N, dim) to context (B, M, dim): (B, N, dim)."""

    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"latent_dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads, self.dropout = num_heads, dropout
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context):
        split = lambda y: y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, dim) -> (B, heads, N, d)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(split(self.to_q(x)), split(k), split(v),
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(y.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, dim)


class Block(nn.Module):
    """Attention, then an MLP, each on normalised input and added to what came in (a pre-norm transformer block).

    With cross=True, x (B, N, dim) attends to a context (B, M, dim); else to itself. Returns (B, N, dim).
    """

    def __init__(self, dim, num_heads, dropout=0.0, cross=False, widening=2):
        super().__init__()
        self.norm_x, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if cross else None
        self.attention = Attention(dim, num_heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, widening * dim), nn.ReLU(),
                                 nn.Linear(widening * dim, dim), nn.Dropout(dropout))

    def forward(self, x, context=None):
        y = self.norm_x(x)
        x = x + self.attention(y, y if context is None else self.norm_context(context))
        return x + self.mlp(self.norm_mlp(x))


class PerceiverIO(nn.Module):
    """A set of (coordinate, value) pairs in, values at any coordinates out. Perceiver IO, figure 2.

    Attention costs num_latents * (N_in + N_out), not N_in * N_out.
    Raises ValueError where latent_dim is not a multiple of num_heads.
    """

    def __init__(self, input_channels=3, output_channels=3, num_latents=512, latent_dim=512, num_fourier_feats=256,
                 num_blocks=6, num_heads=8, dropout=0.1):
        super().__init__()
        self.fourier = FourierFeatures(num_fourier_feats)
        self.embed_coords = nn.Linear(2 * num_fourier_feats, latent_dim)
        self.embed_values = nn.Linear(input_channels, latent_dim)
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim) * 0.02)
        self.encoder = Block(latent_dim, num_heads, dropout, cross=True)
        self.processor = nn.ModuleList([Block(latent_dim, num_heads, dropout) for _ in range(num_blocks)])
        self.decoder = Block(latent_dim, num_heads, dropout, cross=True, widening=4)
        self.norm_out = nn.LayerNorm(latent_dim)
        self.to_values = nn.Linear(latent_dim, output_channels)

    def tokens(self, coords, values=None, extra=0):
        """coords (B, N, 2), values (B, N, input_channels) or None, extra broadcast to (B, N, dim) -> (B, N, dim)."""
        token = self.embed_coords(self.fourier(coords)) + extra
        return token if values is None else token + self.embed_values(values)

    def encode(self, tokens):
        """All tokens (B, N, dim) -> latents (B, num_latents, dim): encoder and processor."""
        latents = self.encoder(self.latents.expand(len(tokens), -1, -1), tokens)
        for block in self.processor:
            latents = block(latents)
        return latents

    def decode(self, queries, latents):
        """Output queries (B, N_out, dim) read the latents -> (B, N_out, output_channels)."""
        return self.to_values(self.norm_out(self.decoder(queries, latents)))

    def forward(self, input_coords, input_values, output_coords):
        """(B, N_in, 2), (B, N_in, input_channels), (B, N_out, 2) -> (B, N_out, output_channels)."""
        return self.decode(self.tokens(output_coords), self.encode(self.tokens(input_coords, input_values)))


CORRELATION_LENGTH = 16 / 31  # of the field's covariance exp(-distance / length): 16 pixels of a 32 x 32 image
NUGGET = 1e-3                 # a pinch of white noise at the inputs: keeps the matrices well conditioned


def covariance(a, b):
    """exp(-|a - b| / length) between coordinates a (B, N, 2) and b (B, M, 2): (B, N, M), 1 at distance 0."""
    squared = (a[:, :, None, 0] - b[:, None, :, 0]).square_() + (a[:, :, None, 1] - b[:, None, :, 1]).square_()
    return squared.sqrt_().mul_(-1 / CORRELATION_LENGTH).exp_()


class GaussianField:
    """The posterior of a Gaussian random field, given clean input pixels and noisy output pixels. No weights.

    The prior: every channel is the inputs' mean plus a field of covariance sigma^2 exp(-distance / length).
    The observations: input_values (B, N_in, C) as they are, x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps at
    output_coords (B, N_out, 2). Gaussian prior and Gaussian noise make E[x_0 | x_t, x_in] linear algebra (Rasmussen
    & Williams, "Gaussian Processes for Machine Learning", 2006, eq. 2.25). Without x_t this is kriging.
    """

    def __init__(self, input_coords, input_values, output_coords):
        self.input_coords, self.output_coords, self.eigen = input_coords, output_coords, None
        k_ii = covariance(input_coords, input_coords)
        k_ii.diagonal(dim1=1, dim2=2).add_(NUGGET)
        self.k_io = covariance(input_coords, output_coords)                          # (B, N_in, N_out)
        self.chol = torch.linalg.cholesky(k_ii)
        self.mean = input_values.mean(dim=1, keepdim=True)                           # (B, 1, C)
        centred = input_values - self.mean
        self.weights = torch.cholesky_solve(centred, self.chol)                      # (B, N_in, C)
        # sigma^2 by maximum likelihood, y^T K^-1 y / N, drawn towards 0.2 as long as there are few inputs.
        n = input_values.shape[1]
        self.variance = (((centred * self.weights).sum(1).mean(-1) + 4 * 0.2) / (n + 4))[:, None, None]  # (B, 1, 1)
        self.kriging = self.mean + self.k_io.transpose(1, 2) @ self.weights          # (B, N_out, C)

    def outputs_given_inputs(self, skip=0):
        """(half, given): L^-1 K_io (B, N_in, N_out), and the outputs' covariance given the inputs (B, N_out, N_out)."""
        outputs = self.output_coords[skip:]
        half = torch.linalg.solve_triangular(self.chol[skip:], self.k_io[skip:], upper=False)
        return half, torch.baddbmm(covariance(outputs, outputs), half.transpose(1, 2), half, alpha=-1)

    def prepare(self):
        """Do once what every step of a sampler needs: with the eigenvectors of `given`, each step is a product."""
        self.half, self.given = self.outputs_given_inputs()
        self.eigen = torch.linalg.eigh(self.given)
        return self

    def condition(self, x_t, alpha_bar, skip=0):
        """Take the noisy outputs in as well. x_t (B, N_out, C); alpha_bar (B,) in [0, 1].

        The first `skip` images are known to be pure noise, which says nothing: for them all stays as it is. Returns
        (mean, input_weights, output_weights): E[x_0 | x_t, x_in] at the outputs (B, N_out, C), and the weights of the
        covariance functions centred on the inputs (B, N_in, C) and the outputs (B, N_out, C); their sum is the mean
        at any other place.
        """
        if skip == len(x_t):
            return self.kriging, self.weights, torch.zeros_like(x_t)
        bar, chol = alpha_bar[skip:, None, None], self.chol[skip:]
        # x_t / sqrt(alpha_bar) is x_0 plus noise: (given + noise I) w = surprise, both sides times alpha_bar.
        surprise = bar.sqrt() * (x_t[skip:] - bar.sqrt() * self.kriging[skip:])
        noise = ((1 - bar) / self.variance[skip:]).clamp(min=1e-4)                   # (B, 1, 1)
        if self.eigen:
            half, given, values, vectors = (x[skip:] for x in (self.half, self.given, *self.eigen))
            output_weights = vectors @ ((vectors.mT @ surprise) / (bar * values[..., None].clamp(min=0) + noise))
        else:
            half, given = self.outputs_given_inputs(skip)
            system = bar * given
            system.diagonal(dim1=1, dim2=2).add_(noise.squeeze(-1))
            output_weights = torch.cholesky_solve(surprise, torch.linalg.cholesky(system))
        input_weights = self.weights[skip:] - torch.linalg.solve_triangular(chol.mT, half @ output_weights, upper=True)
        mean = self.kriging[skip:] + given @ output_weights
        return (torch.cat([self.kriging[:skip], mean]), torch.cat([self.weights[:skip], input_weights]),
                torch.cat([torch.zeros_like(x_t[:skip]), output_weights]))


def kriging(query_coords, input_coords, input_values):
    """Mean of a Gaussian random field given scattered values: (B, N, 2), (B, N_in, 2), (B, N_in, C) -> (B, N, C)."""
    return GaussianField(input_coords, input_values, query_coords).kriging


class NFDenoiser(nn.Module):
    """The neural field: predicts the clean values of noisy output pixels, given clean input pixels.

    Same arguments as PerceiverIO, and
    stencil: odd side of the square of lattice points around an output pixel at which it sees the field's mean;
    stencil_dim: width of the MLP that reads them.
    side: of the lattice on which that mean is laid out, the training images' height and width.
    alphas_cumprod: (T,), the schedule that x_t comes from; None is the cosine schedule with T = 1000, unclipped.
    The GaussianField inside costs N_in^3 + N_out^3 an image: fine for hundreds of pixels, not for tens of thousands.
    Raises ValueError for an even stencil, different channels in and out, or as PerceiverIO does.
    """

    def __init__(self, input_channels=3, output_channels=3, num_latents=512, latent_dim=512, num_fourier_feats=256,
                 num_blocks=6, num_heads=8, dropout=0.1, stencil=7, stencil_dim=512, side=32, alphas_cumprod=None):
        super().__init__()
        if stencil % 2 != 1 or input_channels != output_channels:
            raise ValueError(f"the stencil must be odd ({stencil}), and what goes in must be of the kind of what comes out "
                             f"({input_channels} and {output_channels} channels)")
        self.side, self.stencil = side, stencil
        self.perceiver = PerceiverIO(input_channels, output_channels, num_latents, latent_dim, num_fourier_feats,
                                     num_blocks, num_heads, dropout)
        self.marker = nn.Parameter(torch.randn(2, latent_dim) * 0.02)  # 0: a clean input pixel, 1: a noisy output pixel
        self.embed_time = nn.Sequential(SinusoidalTimeEmbedding(128), nn.Linear(128, latent_dim), nn.ReLU(),
                                        nn.Linear(latent_dim, latent_dim))
        self.embed_mean = nn.Linear(input_channels, latent_dim)
        self.embed_around = nn.Sequential(nn.Linear(stencil**2 * (input_channels + 2), stencil_dim), nn.ReLU(),
                                          nn.Linear(stencil_dim, stencil_dim), nn.ReLU(),
                                          nn.Linear(stencil_dim, latent_dim))
        nn.init.normal_(self.perceiver.to_values.weight, std=0.01)  # begin close to the Gaussian field's answer
        if alphas_cumprod is None:
            t = torch.arange(1, 1001, dtype=torch.float64) / 1000
            alphas_cumprod = (torch.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        # The lattice's covariance as a convolution kernel on a torus of twice the size, in Fourier space.
        steps = torch.arange(2 * side)
        steps = torch.minimum(steps, 2 * side - steps) / (side - 1)
        distance = (steps[:, None].square() + steps[None, :].square()).sqrt()
        self.register_buffer("kernel_hat", torch.fft.rfft2(torch.exp(-distance / CORRELATION_LENGTH)).real)

    def corners(self, coords):
        """The 4 lattice points around each coordinate (B, N, 2) and their bilinear shares: two lists of (B, N)."""
        position = coords * (self.side - 1)
        whole = position.round()  # a pixel is one point, also where 31 * (3 / 31) is not quite 3
        position = torch.where((position - whole).abs() < 1e-4, whole, position)
        corner = position.floor().clamp(0, self.side - 2)
        x, y = (position - corner).unbind(-1)                                        # in [0, 1]
        column, row = corner.long().unbind(-1)
        places = [(column + dx, row + dy) for dy in (0, 1) for dx in (0, 1)]
        return places, [(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y]

    def lattice(self, coords, weights):
        """Put weights (B, N, C) down on the lattice, each shared by the points around it: (B, side, side, C)."""
        image = weights.new_zeros(len(weights), self.side**2, weights.shape[-1])
        for (column, row), share in zip(*self.corners(coords)):
            index = (row * self.side + column)[..., None].expand_as(weights)
            image.scatter_add_(1, index, share[..., None] * weights)
        return image.unflatten(1, (self.side, self.side))

    def read(self, image, coords, offset):
        """Read a lattice (B, side, side, C) on the square of offsets around coords (B, N, 2): (B, N, K * K, C)."""
        pixels, n = image.flatten(0, 2), self.side                                   # (B * side^2, C)
        first_row = torch.arange(len(image), device=image.device)[:, None, None, None] * n
        seen = 0
        for (column, row), share in zip(*self.corners(coords)):
            # For the pixels of an image one corner has all; on a GPU, asking would cost more than adding zeros.
            if share.is_cuda or share.any() or not share.numel():
                rows = (row[..., None] + offset).clamp(0, n - 1)[..., :, None]       # (B, N, K, 1)
                columns = (column[..., None] + offset).clamp(0, n - 1)[..., None, :]
                index = (first_row + rows) * n + columns                             # (B, N, K, K)
                part = pixels.index_select(0, index.flatten()).view(*index.shape[:2], len(offset) ** 2, image.shape[-1])
                seen = seen + share[..., None, None] * part
        return seen

    def look_around(self, field, mean, input_weights, output_weights, alpha_bar):
        """What the Gaussian field looks like around each output pixel: (B, N_out, stencil^2 * (C + 2)).

        Its mean, relative to the mean at the pixel and in units of the field's standard deviation; where the input
        pixels are; and where the output pixels are, each counting as much as it knows (alpha_bar).
        """
        given = self.lattice(field.input_coords, F.pad(input_weights, (0, 1), value=1.0))
        asked = self.lattice(field.output_coords, F.pad(output_weights, (0, 1), value=1.0))
        n, reach = self.side, self.stencil // 2
        weights = (given[..., :-1] + asked[..., :-1]).movedim(-1, 1)                  # (B, C, n, n)
        image = torch.fft.irfft2(torch.fft.rfft2(weights, s=(2 * n, 2 * n)) * self.kernel_hat, s=(2 * n, 2 * n))
        image = image[..., :n, :n].movedim(1, -1) / field.variance[..., None].sqrt()
        image = torch.cat([image, given[..., -1:], alpha_bar[:, None, None, None] * asked[..., -1:]], dim=-1)

        # Pixels of the stencil around the lattice point left above each output, then a bilinear mean for what is between.
        offset = torch.arange(-reach, reach + 1, device=image.device)
        seen = self.read(image, field.output_coords, offset)                         # (B, N_out, stencil^2, C + 2)
        centre = F.pad((mean - field.mean) / field.variance.sqrt(), (0, 2))[:, :, None, :]
        return (seen - centre).flatten(2)

    @torch.no_grad()
    def prepare(self, output_coords, input_coords, input_values):
        """What forward works out again for every timestep of a sampler: hand it over as `field`, with the same pixels."""
        return GaussianField(input_coords, input_values, output_coords).prepare()

    def forward(self, noisy_output_values, output_coords, t, input_coords, input_values, pure_noise=0, field=None):
        """Predict the clean output values.

        noisy_output_values: x_t (B, N_out, C); output_coords (B, N_out, 2) and input_coords (B, N_in, 2) in [0, 1],
        N_in >= 1; t: int64 (B,) in 0..T-1; input_values (B, N_in, C): clean, never noised. Values live in [-1, 1].
        pure_noise: so many images, from the first, are known to be at the last timestep, which saves work; field: what
        `prepare` gave for these pixels, likewise.
        Returns x_0_hat (B, N_out, C). Raises ValueError for shapes that do not fit together.
        """
        if input_coords.shape[1] < 1 or input_coords.shape[:2] != input_values.shape[:2] \
                or output_coords.shape[:2] != noisy_output_values.shape[:2]:
            raise ValueError(f"want matching coordinates and values and at least one input pixel, got inputs "
                             f"{tuple(input_coords.shape)} and {tuple(input_values.shape)}, outputs "
                             f"{tuple(output_coords.shape)} and {tuple(noisy_output_values.shape)}")
        alpha_bar = self.alphas_cumprod[t]
        with torch.no_grad(), torch.autocast(noisy_output_values.device.type, enabled=False):
            field = field or GaussianField(input_coords, input_values, output_coords)
            mean, input_weights, output_weights = field.condition(noisy_output_values, alpha_bar, pure_noise)
            around = self.look_around(field, mean, input_weights, output_weights, alpha_bar)
            # How far x_0 may be from that mean: 7% of the field's variance given the inputs, less given x_t as well.
            variance, bar = 0.07 * field.variance, alpha_bar[:, None, None]
            std = (variance * (1 - bar) / (bar * variance + 1 - bar)).sqrt()         # (B, 1, 1)

        perceiver = self.perceiver
        time_token = self.embed_time(t)[:, None, :]                                  # (B, 1, dim)
        given = perceiver.tokens(input_coords, input_values, self.marker[0] + time_token)
        asked = self.embed_around(around) + self.embed_mean(mean) + self.marker[1] + time_token
        # The query carries x_t, by as much as there is in it: pure noise is not worth reading.
        asked = perceiver.tokens(output_coords, bar.sqrt() * noisy_output_values, asked)
        latents = perceiver.encode(torch.cat([given, asked], dim=1))
        return mean + std * perceiver.decode(asked, latents)


def parameters_and_flops(model, work):
    """(number of parameters, floating point operations of the matrix products in work())."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no fused attention
        work()
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def seconds(work, device, at_least=1.0):
    """Mean seconds that work() takes, after one call to warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    work()
    wait()
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < at_least:
        work()
        wait()
        rounds += 1
    return (time.perf_counter() - start) / rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--batch-size", type=int, help="default: 32 for small, 4 for full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.error = fail
    args = parser.parse_args()
    batch = (32 if args.size == "small" else 4) if args.batch_size is None else args.batch_size
    if batch < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch}")
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"--device {args.device} cannot be used: {str(problem).splitlines()[0]}") from None

    torch.manual_seed(0)
    model = NFDenoiser(**SIZES[args.size]).to(device)
    pixels = torch.rand(batch, 1024, device=device).argsort(1)[:, :408]             # 204 inputs, 204 outputs
    coords = torch.stack([pixels % 32, pixels // 32], -1) / 31
    values = torch.rand(batch, 408, 3, device=device) * 2 - 1
    t = torch.randint(0, 1000, (batch,), device=device)
    run = lambda: model(values[:, 204:], coords[:, 204:], t, coords[:, :204], values[:, :204])

    def forward():
        with torch.no_grad():
            run()

    matrix = torch.rand(2048, 2048, device=device)
    rate = 2 * 2048**3 / seconds(lambda: matrix @ matrix, device)
    print(f"{args.size}: batches of {batch}, 204 pixels in, 204 out, float32, {device}, {torch.get_num_threads()} threads")
    backward = lambda: run().square().mean().backward()
    for name, work, counted in (("forward", forward, run), ("forward + backward", backward, backward)):
        parameters, flops = parameters_and_flops(model, counted)
        each = seconds(work, device, 2.0) / batch
        print(f"{name:20}{parameters:11,} parameters {flops / batch / 1e9:8.3f} GFLOP an image {1 / each:8.1f} images/s "
              f"{flops / batch / each / rate:5.0%} of the matmul rate ({rate / 1e9:.0f} GFLOP/s)")
    print("(FLOPs count the matrix products; nothing was written)")


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        fail(problem)
