"""A neural field as a denoiser: a Perceiver IO that turns scattered pixels into a function of position.

An image is a set of pixels (coordinate, value). Some are given, clean and fixed (the input); others start as Gaussian
noise and are denoised step by step (the output). The network predicts the clean output values in one go:

    x_0_hat = f(x_t_out, coords_out, t, coords_in, x_in),        loss = mean (x_0_hat - x_0)^2

It has three parts. The first is exact and has no weights: if images were Gaussian random fields, the best prediction
E[x_0 | x_t, x_in] would be linear algebra (GaussianField, below). The second is a small U-Net that looks at that
prediction around each pixel. The third is a Perceiver IO, which sees all pixels at once. Both learn the rest, what makes
an image more than a random field:

    encoder    learned latents read all pixels          cross-attention
    processor  the latents talk to each other           self-attention, num_blocks times
    decoder    every queried pixel reads the latents    cross-attention

    python nf_denoiser.py                  # the parts and their parameters
    python nf_denoiser.py --bench          # images per second, share of the matmul rate, what a training step spends

Papers: Perceiver IO (Jaegle et al., 2021, arXiv 2107.14795); DDPM (Ho et al., 2020, arXiv 2006.11239); Fourier
features (Tancik et al., 2020, arXiv 2006.10739). This file needs nothing but torch: copy it anywhere.
"""
import argparse
import math
import statistics
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SIZES = {  # what `--size` means; everything else is NFDenoiser's default
    "full": dict(num_latents=512, latent_dim=512, num_fourier_feats=256, num_blocks=6, num_heads=8, dropout=0.1,
                 widths=(96, 192, 384)),
    "small": dict(num_latents=32, latent_dim=64, num_fourier_feats=32, num_blocks=1, num_heads=2, dropout=0.0,
                  widths=(32, 64, 96)),
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
    """Multi-head attention softmax(Q K^T / sqrt(d) + bias) V from x (B, N, dim) to context (B, M, dim): (B, N, dim).

    x may be (1, N, dim), the same for every context. bias (B, 1, 1, M) or None makes parts of the context count less.
    There is no dropout on the softmax: the fused kernel for CPUs has none. ValueError for a dim that heads do not divide.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"latent_dim ({dim}) must be a multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context, bias=None):
        split = lambda y: y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, dim) -> (B, heads, N, d)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q = split(self.to_q(x)).expand(len(context), -1, -1, -1)
        y = F.scaled_dot_product_attention(q, split(k), split(v), None if bias is None else bias.to(q.dtype))
        return self.to_out(y.transpose(1, 2).flatten(2))  # (B, heads, N, d) -> (B, N, dim)


class Block(nn.Module):
    """Attention, then an MLP, each on normalised input and added to what came in (a pre-norm transformer block).

    With cross=True, x (B or 1, N, dim) attends to a context (B, M, dim); else to itself. Returns (B, N, dim).
    """

    def __init__(self, dim, num_heads, dropout=0.0, cross=False, widening=2):
        super().__init__()
        self.norm_x, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if cross else None
        self.attention = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, widening * dim), nn.ReLU(),
                                 nn.Linear(widening * dim, dim), nn.Dropout(dropout))

    def forward(self, x, context=None, bias=None):
        y = self.norm_x(x)
        x = x + self.attention(y, y if context is None else self.norm_context(context), bias)
        return x + self.mlp(self.norm_mlp(x))


class PerceiverIO(nn.Module):
    """A set of (coordinate, value) pairs in, values at any coordinates out. Perceiver IO, figure 2.

    Attention costs num_latents * (N_in + N_out), not N_in * N_out. dropout: of the MLPs' outputs.
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
        self.decoder = Block(latent_dim, num_heads, dropout, cross=True, widening=1)
        self.norm_out = nn.LayerNorm(latent_dim)
        self.to_values = nn.Linear(latent_dim, output_channels)

    def tokens(self, coords, values=None):
        """coords (B, N, 2), values (B, N, input_channels) or None -> (B, N, dim)."""
        token = self.embed_coords(self.fourier(coords))
        return token if values is None else token + self.embed_values(values)

    def encode(self, tokens, bias=None):
        """All tokens (B, N, dim), attention bias (B, 1, 1, N) -> latents (B, num_latents, dim): encoder, processor."""
        latents = self.encoder(self.latents[None], tokens, bias)
        for block in self.processor:
            latents = block(latents)
        return latents

    def decode(self, queries, latents):
        """Output queries (B, N_out, dim) read the latents -> (B, N_out, output_channels)."""
        return self.to_values(self.norm_out(self.decoder(queries, latents)))

    def forward(self, input_coords, input_values, output_coords):
        """(B, N_in, 2), (B, N_in, input_channels), (B, N_out, 2) -> (B, N_out, output_channels)."""
        return self.decode(self.tokens(output_coords), self.encode(self.tokens(input_coords, input_values)))


NUGGET = 1e-3  # a pinch of white noise at the inputs: keeps the matrices well conditioned


def exponential(a, b, length=16 / 31):
    """exp(-|a - b| / length) between coordinates a (B, N, 2) and b (B, M, 2): (B, N, M), 1 at distance 0.

    The textbook's covariance; a length of 16 / 31 is 16 pixels of a 32 x 32 image.
    """
    squared = (a[:, :, None, 0] - b[:, None, :, 0]).square_() + (a[:, :, None, 1] - b[:, None, :, 1]).square_()
    return squared.sqrt_().mul_(-1 / length).exp_()


def cosines(positions, side):
    """The waves of the discrete cosine transform (DCT-II) at any positions (...,), in pixels: (..., side).

    At 0, 1, ..., side - 1 they are orthonormal: the matrix cosines(arange(side), side) transforms back.
    """
    k = torch.arange(side, device=positions.device)
    return ((positions[..., None] + 0.5) * k * (math.pi / side)).cos() * ((2 - (k == 0).float()) / side).sqrt()


def power_spectrum(images):
    """How much of each cosine wave there is in images uint8 (N, C, side, side): their mean square, (side, side) float.

    Divided by its mean, so that a random field with these variances has variance 1. [0, 0] is the mean colour's.
    """
    transform, total = cosines(torch.arange(images.shape[-1], device=images.device), images.shape[-1]), 0
    for part in images.split(1000):
        total = total + (transform.T @ (part.float() / 127.5 - 1) @ transform).square().sum((0, 1))
    return total / total.mean()


class GaussianField:
    """The posterior of a Gaussian random field, given clean input pixels and noisy output pixels. No weights.

    The prior: a channel is the inputs' mean plus a field of covariance sigma^2 covariance(a, b), with a sigma of its own.
    The observations: input_values (B, N_in, C) as they are, x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps at
    output_coords (B, N_out, 2). Gaussian prior and Gaussian noise make E[x_0 | x_t, x_in] linear algebra (Rasmussen
    & Williams, "Gaussian Processes for Machine Learning", 2006, eq. 2.25). Without x_t this is kriging.
    """

    def __init__(self, input_coords, input_values, output_coords, covariance=exponential):
        self.input_coords, self.output_coords, self.covariance = input_coords, output_coords, covariance
        self.cached = self.eigen = None
        k_ii = covariance(input_coords, input_coords)
        k_ii.diagonal(dim1=1, dim2=2).add_(NUGGET)
        self.chol = torch.linalg.cholesky(k_ii)
        self.mean = input_values.mean(dim=1, keepdim=True)                           # (B, 1, C)
        centred = input_values - self.mean
        self.weights = torch.cholesky_solve(centred, self.chol)                      # (B, N_in, C)
        # sigma^2 by maximum likelihood, y^T K^-1 y / N, drawn towards 0.05 as long as there are few inputs.
        n = input_values.shape[1]
        self.variance = ((centred * self.weights).sum(1, keepdim=True) + 2 * 0.05) / (n + 2)             # (B, 1, C)

    def between(self):
        """What outputs and inputs have to do with each other, worked out when it is first asked for.

        (half, given, expected): L^-1 K_io (B, N_in, N_out), the outputs' covariance given the inputs (B, N_out, N_out),
        and their mean given the inputs (B, N_out, C).
        """
        if self.cached is None:
            k_io = self.covariance(self.input_coords, self.output_coords)            # (B, N_in, N_out)
            half = torch.linalg.solve_triangular(self.chol, k_io, upper=False)
            given = torch.baddbmm(self.covariance(self.output_coords, self.output_coords), half.mT, half, alpha=-1)
            self.cached = half, given, self.mean + k_io.mT @ self.weights
        return self.cached

    def prepare(self):
        """Do once what every step of a sampler needs: with the eigenvectors of `given`, each step is a product."""
        half, given, _ = self.between()
        back = torch.linalg.solve_triangular(self.chol.mT, half, upper=True)         # (B, N_in, N_out)
        self.eigen = *torch.linalg.eigh(given), back

    def condition(self, x_t, alpha_bar):
        """Take the noisy outputs in as well. x_t (B, N_out, C); alpha_bar (B,) in [0, 1].

        Returns (input_weights, output_weights), of the covariance functions centred on the inputs (B, N_in, C) and the
        outputs (B, N_out, C): their sum, plus `mean`, is E[x_0 | x_t, x_in] at any place.
        """
        half, given, expected = self.between()
        bar = alpha_bar[:, None, None]
        # x_t / sqrt(alpha_bar) is x_0 plus noise: (given + noise I) w = surprise, both sides times alpha_bar.
        surprise = bar.sqrt() * (x_t - bar.sqrt() * expected)
        noise = ((1 - bar) / self.variance).clamp(min=1e-4)                          # (B, 1, C)
        if self.eigen:
            values, vectors, back = self.eigen
            output_weights = vectors @ ((vectors.mT @ surprise) / (bar * values[..., None].clamp(min=0) + noise))
            taken = back @ output_weights
        else:
            system = (bar * given)[:, None].repeat(1, x_t.shape[-1], 1, 1)           # (B, C, N_out, N_out)
            system.diagonal(dim1=2, dim2=3).add_(noise.mT)
            output_weights = torch.cholesky_solve(surprise.mT[..., None], torch.linalg.cholesky(system))[..., 0].mT
            taken = torch.linalg.solve_triangular(self.chol.mT, half @ output_weights, upper=True)
        return self.weights - taken, output_weights


def kriging(query_coords, input_coords, input_values):
    """Mean of a Gaussian random field given scattered values: (B, N, 2), (B, N_in, 2), (B, N_in, C) -> (B, N, C)."""
    field = GaussianField(input_coords, input_values, query_coords)
    return field.mean + field.covariance(query_coords, input_coords) @ field.weights


class SmallUNet(nn.Module):
    """Lets every place see its surroundings: 3 x 3 convolutions at full, half, ... resolution, one width for each.

    (B, channels, H, W) -> (B, widths[0], H, W), H and W divisible by 2^(len(widths) - 1). After U-Net (Ronneberger et
    al., 2015, arXiv 1505.04597), with sums for its concatenations.
    """

    def __init__(self, channels, widths):
        super().__init__()
        conv = lambda a, b, **more: nn.Conv2d(a, b, 3, padding=1, **more)
        pairs = list(zip(widths, widths[1:]))
        self.first = conv(channels, widths[0])
        self.before = nn.ModuleList(conv(a, a) for a in widths)
        self.down = nn.ModuleList(conv(a, b, stride=2) for a, b in pairs)
        self.bottom = conv(widths[-1], widths[-1])
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.after = nn.ModuleList(conv(a, a) for a, _ in pairs)

    def forward(self, x):
        x, skips = self.first(x.contiguous(memory_format=torch.channels_last)), []
        for i, before in enumerate(self.before):
            x = self.down[i - 1](x.relu()) if i else x
            x = x + before(x.relu())
            skips.append(x)
        x = x + self.bottom(x.relu())
        for i in reversed(range(len(self.up))):
            x = skips[i] + F.interpolate(self.up[i](x.relu()), scale_factor=2)
            x = x + self.after[i](x.relu())
        return x


class Geometry(NamedTuple):
    """What NFDenoiser works out about a set of pixels, whatever the timestep and x_t."""
    field: GaussianField
    known: torch.Tensor       # occupancy of the lattice by input pixels (B, 1, side, side)
    asked: torch.Tensor       # and by output pixels
    input_axes: tuple         # cosine waves at the input pixels (B, N_in, side), along x and along y
    output_axes: tuple
    inputs: torch.Tensor      # tokens, as far as they do not depend on t (B, N_in, latent_dim)
    outputs: torch.Tensor


class NFDenoiser(nn.Module):
    """The neural field: predicts the clean values of noisy output pixels, given clean input pixels.

    Same arguments as PerceiverIO, and
    widths: channels of the U-Net at full, half, ... resolution; side: of the lattice on which it looks at the field's
    mean, the training images' height and width.
    alphas_cumprod: (T,), the schedule that x_t comes from; None is the cosine schedule with T = 1000, unclipped.
    spectrum: (side, side), the power_spectrum of the training images; None is a power law.
    The GaussianField inside costs N_in^3 + N_out^3 an image: fine for hundreds of pixels, not for tens of thousands.
    Raises ValueError for different channels in and out, a side that the U-Net cannot halve, or as PerceiverIO does.
    """

    def __init__(self, input_channels=3, output_channels=3, num_latents=512, latent_dim=512, num_fourier_feats=256,
                 num_blocks=6, num_heads=8, dropout=0.1, widths=(96, 192, 384), side=32, alphas_cumprod=None, spectrum=None):
        super().__init__()
        if input_channels != output_channels or side % 2 ** (len(widths) - 1):
            raise ValueError(f"want as many channels in as out and a side that can be halved {len(widths) - 1} times, got "
                             f"{input_channels} and {output_channels} channels, side {side}")
        self.side = side
        self.perceiver = PerceiverIO(input_channels, output_channels, num_latents, latent_dim, num_fourier_feats,
                                     num_blocks, num_heads, dropout)
        self.marker = nn.Parameter(torch.randn(2, latent_dim) * 0.02)  # 0: a clean input pixel, 1: a noisy output pixel
        self.embed_time = nn.Sequential(SinusoidalTimeEmbedding(128), nn.Linear(128, latent_dim), nn.ReLU(),
                                        nn.Linear(latent_dim, latent_dim))
        self.embed_mean = nn.Linear(input_channels, latent_dim)
        self.surroundings = SmallUNet(input_channels + 3, widths)
        self.embed_surroundings = nn.Linear(widths[0], latent_dim)
        nn.init.normal_(self.perceiver.to_values.weight, std=0.01)  # begin close to the Gaussian field's answer
        nn.init.zeros_(self.perceiver.to_values.bias)
        if alphas_cumprod is None:
            t = torch.arange(1, 1001, dtype=torch.float64) / 1000
            alphas_cumprod = (torch.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        if spectrum is None:
            k = torch.arange(side)
            spectrum = (4.0 + k[:, None] ** 2 + k**2) ** -1.5
        self.register_buffer("spectrum", (spectrum / spectrum.mean()).float().cpu())
        # The cosine transform of three channels is that of our eyes: brightness, red against blue, green against both.
        self.register_buffer("colours", cosines(torch.arange(input_channels), input_channels), persistent=False)
        self.register_buffer("lattice", cosines(torch.arange(side), side), persistent=False)
        self.register_buffer("table", torch.empty(0), persistent=False)
        self.tabulate()
        self.register_load_state_dict_post_hook(lambda module, _: module.tabulate())

    def tabulate(self):
        """What follows from the spectrum: the covariance of each point of the lattice with each other."""
        basis = torch.kron(self.lattice, self.lattice)                               # (side^2 points, side^2 waves)
        self.table = basis * self.spectrum.flatten() @ basis.T

    def covariance(self, a, b):
        """Of the field whose cosine waves have the variances `spectrum`: (B, N, 2), (B, M, 2) -> (B, N, M)."""
        places = [coords * (self.side - 1) for coords in (a, b)]
        if not a.is_cuda and all(((x - x.round()).abs() < 1e-4).all() for x in places):  # pixels: look it up
            row, column = ((x.round() @ x.new_tensor([1.0, self.side])).long() for x in places)
            rows = self.table.index_select(0, row.flatten()).view(*row.shape, -1)    # (B, N, side^2)
            return rows.gather(2, column[:, None, :].expand(-1, row.shape[1], -1))
        waves = [(y[..., None] * x[..., None, :]).flatten(2) for x, y in map(self.axes, (a, b))]  # (B, N, side^2)
        return waves[0] * self.spectrum.flatten() @ waves[1].mT

    def axes(self, coords):
        """The cosine waves along x and along y at coords (B, N, 2): (B, N, side) each."""
        return cosines(coords * (self.side - 1), self.side).unbind(2)

    def waves(self, axes, weights):
        """Covariance functions centred on the pixels of axes, times weights (B, N, C), as waves: (B, C, side, side)."""
        x, y = axes
        return self.spectrum * torch.einsum("bny,bnc,bnx->bcyx", y, weights, x)

    def at(self, waves, axes):
        """The field made of waves (B, C, side, side) at the pixels of axes: (B, N, C)."""
        x, y = axes
        return ((y[:, None] @ waves) * x[:, None]).sum(-1).mT

    def occupancy(self, coords):
        """How many of the coords (B, N, 2) are at each lattice point, those between shared out: (B, 1, side, side)."""
        position, image = coords * (self.side - 1), coords.new_zeros(len(coords), self.side**2)
        corner = (position + 1e-4).floor().clamp(0, self.side - 2)
        right, down = (position - corner).unbind(-1)                                 # in [0, 1]
        first = (corner @ corner.new_tensor([1.0, self.side])).long()                # the lattice point left above
        for offset, share in ((0, (1 - right) * (1 - down)), (1, right * (1 - down)),
                              (self.side, (1 - right) * down), (self.side + 1, right * down)):
            image.scatter_add_(1, first + offset, share)
        return image.view(-1, 1, self.side, self.side)

    def geometry(self, output_coords, input_coords, input_values):
        """The part of forward that is the same at every timestep; arguments as there. Only the tokens have gradients."""
        with torch.no_grad(), torch.autocast(input_values.device.type, enabled=False):
            field = GaussianField(input_coords, input_values @ self.colours, output_coords, self.covariance)
            lattice = self.occupancy(input_coords), self.occupancy(output_coords)
            axes = self.axes(input_coords), self.axes(output_coords)
        inputs = self.perceiver.tokens(input_coords, input_values) + self.marker[0]
        return Geometry(field, *lattice, *axes, inputs, self.perceiver.tokens(output_coords) + self.marker[1])

    @torch.no_grad()
    def prepare(self, output_coords, input_coords, input_values):
        """What a sampler needs again and again: a Geometry for forward's `prepared`, and for these pixels only.

        output_coords (B, N_out, 2), input_coords (B, N_in, 2), input_values (B, N_in, C). It has no gradients.
        """
        done = self.geometry(output_coords, input_coords, input_values)
        done.field.prepare()
        return done

    def forward(self, noisy_output_values, output_coords, t, input_coords, input_values, pure_noise=False, prepared=None):
        """Predict the clean output values.

        noisy_output_values: x_t (B, N_out, C); output_coords (B, N_out, 2) and input_coords (B, N_in, 2) in [0, 1],
        N_in >= 1; t: int64 (B,) in 0..T-1; input_values (B, N_in, C): clean, never noised. Values live in [-1, 1].
        pure_noise: x_t is known to say nothing (the last timestep), which saves work; prepared: what `prepare` gave for
        these pixels, likewise.
        Returns x_0_hat (B, N_out, C). Raises ValueError where coordinates and values do not match, N_in is 0, or
        `prepared` is used where gradients are wanted.
        """
        if prepared and torch.is_grad_enabled():
            raise ValueError("what prepare gives has no gradients: use it under torch.no_grad()")
        if input_coords.shape[1] < 1 or input_coords.shape[:2] != input_values.shape[:2] \
                or output_coords.shape[:2] != noisy_output_values.shape[:2]:
            raise ValueError(f"want matching coordinates and values and at least one input pixel, got inputs "
                             f"{tuple(input_coords.shape)} and {tuple(input_values.shape)}, outputs "
                             f"{tuple(output_coords.shape)} and {tuple(noisy_output_values.shape)}")
        alpha_bar = self.alphas_cumprod[t]
        bar = alpha_bar[:, None, None]
        done = prepared or self.geometry(output_coords, input_coords, input_values)
        with torch.no_grad(), torch.autocast(noisy_output_values.device.type, enabled=False):
            # The Gaussian field's answer, and what it and the pixels look like on the lattice.
            field, known, asked = done.field, done.known, bar[..., None] * done.asked
            if pure_noise:
                waves = self.waves(done.input_axes, field.weights)
            else:
                input_weights, output_weights = field.condition(noisy_output_values @ self.colours, alpha_bar)
                waves = self.waves(done.input_axes, input_weights) + self.waves(done.output_axes, output_weights)
            mean = field.mean + self.at(waves, done.output_axes)
            size = field.variance.mean((1, 2))[:, None, None, None].sqrt()
            image = self.lattice @ waves @ self.lattice.T / size                     # (B, C, side, side)
            image = torch.cat([image, known, asked, bar[..., None].sqrt().expand_as(known)], dim=1)
            # How far x_0 may be from that mean: 7% of the field's variance given the inputs, less given x_t as well.
            variance = 0.07 * field.variance
            std = (variance * (1 - bar) / (bar * variance + 1 - bar)).sqrt()         # (B, 1, C)

        perceiver = self.perceiver
        time_token = self.embed_time(t)[:, None, :]                                  # (B, 1, dim)
        inputs = done.inputs + time_token
        # What the U-Net makes of the lattice, read between its points; and x_t, by as much as there is in it.
        around = F.grid_sample(self.surroundings(image), 2 * output_coords[:, :, None] - 1, align_corners=True)[..., 0].mT
        outputs = done.outputs + self.embed_surroundings(around.relu()) + self.embed_mean(mean) + time_token
        outputs = outputs + perceiver.embed_values(bar.sqrt() * noisy_output_values)
        if pure_noise:
            latents = perceiver.encode(inputs)
        else:  # a noisy pixel is attended to by as much as it knows: log(alpha_bar) takes it out where that is nothing
            bias = alpha_bar.log()[:, None].expand(-1, outputs.shape[1])
            bias = torch.cat([torch.zeros_like(input_coords[..., 0]), bias], dim=1)[:, None, None, :]
            latents = perceiver.encode(torch.cat([inputs, outputs], dim=1), bias)
        answer = perceiver.decode(outputs, latents).float()
        with torch.autocast(answer.device.type, enabled=False):
            return (mean + std * answer) @ self.colours.T


def flops(work):
    """Floating point operations of the matrix products and convolutions in work()."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no fused attention
        work()
    return counter.get_total_flops()


def seconds(works, device, at_least):
    """Median seconds that each of works takes. They take turns of 50 ms or more: a machine's moods hit all alike."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times, begin = [[] for _ in works], math.inf
    while time.perf_counter() - begin < at_least or len(times[0]) < 2:
        for work, taken in zip(works, times):
            start, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - start < 0.05:
                work()
                wait()
                calls += 1
            taken.append((time.perf_counter() - start) / calls)
        begin = min(begin, time.perf_counter())  # the first round is to warm up
    return [statistics.median(taken[1:]) for taken in times]


def bench(size, batch, device, compiled=False):
    """Print what each part of a training step costs, and what sampling and torch.compile save.

    Parts are timed with 204 output pixels; whole steps with 204 in three of four and 512 in the fourth, as in train.py.
    """
    try:
        from sample import ddim_sample
        from schedule import DiffusionSchedule
        from train import Objective, field_problems
    except ImportError:
        raise ValueError("--bench needs the files beside this one: run it in the repository") from None
    torch.manual_seed(0)
    schedule = DiffusionSchedule().to(device)
    model = NFDenoiser(**SIZES[size], alphas_cumprod=schedule.alphas_cumprod).to(device)
    objective, average = Objective(model), [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    data = torch.randint(0, 256, (max(5000, batch), 3, 32, 32), dtype=torch.uint8, device=device)
    mixed = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
    matrix = torch.rand(2048, 2048, device=device)

    def draw(output_ratio=0.2):
        images = data.index_select(0, torch.randint(len(data), (batch,), device=device))
        return field_problems(images, schedule, None, output_ratio)

    problems, mixture = draw(), (0.2, 0.2, 0.2, 0.5)

    def multiply():
        with mixed:
            matrix @ matrix

    def forward():
        with torch.no_grad(), mixed:
            objective(problems)

    def both(problems=problems, objective=objective):
        optimizer.zero_grad()
        with mixed:
            loss = objective(problems)
        loss.backward()

    def optimise():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 0.01)

    def steps():
        for output_ratio in mixture:
            both(draw(output_ratio))
            optimise()

    times = seconds([multiply, forward, multiply, both, steps, draw, optimise], device, 20.0)
    rate = 2 * 2048**3 / statistics.mean(times[:3:2])
    print(f"{size}: {sum(p.numel() for p in model.parameters()):,} parameters, batches of {batch}, {device}, "
          f"{torch.get_num_threads()} threads, matmul {rate / 1e9:.0f} GFLOP/s")
    for name, each, count in (("forward", times[1], flops(lambda: objective(problems))),
                              ("forward + backward", times[3], flops(both))):
        print(f"  {name:20}{1e3 * each:9.1f} ms {batch / each:8.2f} images/s {count / batch / 1e9:8.3f} GFLOP an image "
              f"{count / each / rate:5.0%} of the matmul rate")
    whole, drawing, optimising = times[4] / len(mixture), *times[5:]
    print(f"  {'whole training step':20}{1e3 * whole:9.1f} ms {batch / whole:8.2f} images/s; of it data, masks and "
          f"noise {drawing / whole:.1%}, optimiser and average {optimising / whole:.1%}")
    model.eval()
    inputs, one = problems[-1][0], len(problems[-1][1])
    given = [inputs[name] for name in ("output_coords", "input_coords", "input_values")]
    sample = lambda: ddim_sample(model, schedule, *given, num_steps=50)
    with torch.no_grad():
        plain, sampling = seconds([lambda: model(**inputs), sample], device, 8.0)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        import resource  # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"  {'DDIM, 50 steps':20}{1e3 * sampling:9.1f} ms for {one} images: {sampling / plain:.1f} plain forward passes; "
          f"peak memory of all this {peak:,.0f} MiB")
    if compiled:
        start, faster = time.perf_counter(), torch.compile(model)
        quick, lots = Objective(faster), [draw(output_ratio) for output_ratio in mixture]
        model.train()
        before, after = seconds([lambda run=run: [both(lot, run) for lot in lots] for run in (objective, quick)], device, 10.0)
        model.eval()
        plain, sampling = seconds([sample, lambda: ddim_sample(faster, schedule, *given, num_steps=50)], device, 8.0)
        print(f"  {'compiled':20}forward + backward {before / after:.2f} times as fast, DDIM {plain / sampling:.2f} times; "
              f"compiling and measuring took {time.perf_counter() - start:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", action="store_true", help="time a training step and sampling (a few minutes)")
    parser.add_argument("--size", choices=list(SIZES), help="with --bench: only this one")
    parser.add_argument("--batch-size", type=int, help="with --bench (default: 32 for small, 4 for full)")
    parser.add_argument("--compile", action="store_true", help="with --bench: what does torch.compile gain?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.error = fail
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 2:
        raise ValueError(f"--batch-size must be at least 2, got {args.batch_size}")
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as problem:
        raise ValueError(f"--device {args.device} cannot be used: {str(problem).splitlines()[0]}") from None
    if args.bench:
        for size in [args.size] if args.size else ["small", "full"]:
            bench(size, args.batch_size or {"small": 32, "full": 4}[size], device, args.compile)
        return
    torch.manual_seed(0)
    pixels = torch.rand(1, 1024).argsort(1)[:, :408]                                 # 204 inputs, 204 outputs
    coords, values = torch.stack([pixels % 32, pixels // 32], -1) / 31, torch.rand(1, 408, 3) * 2 - 1
    for size, config in SIZES.items():
        model = NFDenoiser(**config)
        count = flops(lambda: model(values[:, 204:], coords[:, 204:], torch.tensor([500]), coords[:, :204], values[:, :204]))
        parameters = lambda part: sum(p.numel() for p in part.parameters())
        print(f"{size}: {parameters(model):,} parameters, {count / 1e9:.3f} GFLOP for 204 pixels from 204, namely")
        for name, part in [*model.named_children(), *((f"  {n}", p) for n, p in model.perceiver.named_children())]:
            print(f"  {name:20}{parameters(part):12,}")
    print("(nothing was written; --bench measures speed)")


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        fail(problem)
    except KeyboardInterrupt:
        raise SystemExit(130)
