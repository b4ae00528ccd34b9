"""A neural field as a denoiser: scattered pixels in, the colour at any coordinate out.

An image is a set of pixels (coordinate, value). Some are given, clean and fixed (the input);
others start as Gaussian noise and are denoised step by step (the output). The network predicts
the clean output values directly:

    x_0_hat = f(x_t_out, coords_out, t, coords_in, x_in),      loss = mean (x_0_hat - x_0)^2

It is a sum of three parts, and each can be left out (train.py --parts). The field does most of the
work (21.66 dB without a gradient step, with the U-Net 22.19). Attention, the Perceiver IO, is the
natural network for a set of pixels, but on these small images it adds nothing (22.19): it is here
to be read.

    x_0_hat = mean + std * (unet + perceiver)

    input pixels  (B, N_in, 3)  --+--> field      posterior mean (B, 3, 32, 32) of a Gaussian
    noisy outputs (B, N_out, 3) --+      |        random field: linear algebra; std: (B, 1, 3)
                                  |      v
                                  +--> unet       features of that mean image (B, width, 32, 32)
                                  |      |        read at the output coordinates
                                  |      v
                                  +--> perceiver  latents, learned vectors, attend to all pixels;
                                                  outputs attend to latents: (B, N_out, 3)

    python nf_denoiser.py                  # the parameters of each part, for each --size

Papers: Perceiver IO (Jaegle et al., 2021, arXiv 2107.14795); Gaussian Processes for Machine
Learning (Rasmussen & Williams, 2006); U-Net (Ronneberger et al., 2015, arXiv 1505.04597); DDPM
(Ho et al., 2020, arXiv 2006.11239). This file needs only torch: copy it anywhere.
"""
import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

PARTS = ("field", "unet", "perceiver")
SIZES = {  # --size; "full" has the Perceiver IO of the original design
    "small": dict(widths=(48, 96, 128), num_latents=16, latent_dim=32, num_fourier_feats=16,
                  num_blocks=1, num_heads=2, dropout=0.0),
    "medium": dict(widths=(64, 128, 192), num_latents=16, latent_dim=32, num_fourier_feats=16,
                   num_blocks=1, num_heads=2, dropout=0.0),
    "full": dict(widths=(96, 192, 384), num_latents=512, latent_dim=512, num_fourier_feats=256,
                 num_blocks=6, num_heads=8, dropout=0.1),
}


# --------------------------------------------------------------------- attention and Perceiver IO
class FourierFeatures(nn.Module):
    """gamma(v) = [sin(2 pi B v), cos(2 pi B v)], Tancik et al. (2020), arXiv 2006.10739, eq. 5.

    (..., 2) coordinates in [0, 1] -> (..., 2 * num_feats). B is drawn once from a Gaussian with
    standard deviation `scale` (cycles per image side) and saved with the weights.
    """

    def __init__(self, num_feats, scale=4.0):
        super().__init__()
        self.register_buffer("B", torch.randn(2, num_feats) * scale)

    def forward(self, coords):
        # written out because a matrix product would round the angles under bf16 autocast
        angle = 2 * math.pi * (coords[..., :1] * self.B[0] + coords[..., 1:] * self.B[1])
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class SinusoidalTimeEmbedding(nn.Module):
    """Sines and cosines of t at falling frequencies. Vaswani et al. (2017), section 3.5.

    (B,) timesteps -> (B, dim) in [-1, 1]. Raises ValueError for a dim that is not even.
    """

    def __init__(self, dim):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"the time embedding needs an even dim of at least 2, got {dim}")
        frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("frequencies", frequencies)

    def forward(self, t):
        angle = t[:, None].float() * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention softmax(Q K^T / sqrt(d) + bias) V. Vaswani et al. (2017), eq. 1.

    x (B, N, dim) attends to context (B, M, dim) -> (B, N, dim). bias: (B, 1, 1, M) or None.
    Raises ValueError if dim is not a multiple of num_heads.
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
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for y in (q, k, v))  # (B, heads, N or M, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, bias)  # dropout is in the MLP only
        return self.to_out(y.transpose(1, 2).flatten(2))  # (B, N, dim)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to its input.

    x (B, N, dim) attends to context (B, M, dim) if cross, else to itself -> (B, N, dim).
    """

    def __init__(self, dim, num_heads, dropout=0.0, cross=False):
        super().__init__()
        self.norm_x, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if cross else None
        self.attention = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim),
                                 nn.Dropout(dropout))

    def forward(self, x, context=None, bias=None):
        y = self.norm_x(x)
        x = x + self.attention(y, y if context is None else self.norm_context(context), bias)
        return x + self.mlp(self.norm_mlp(x))


class PerceiverIO(nn.Module):
    """A set of vectors in, an answer for each query out. Perceiver IO (Jaegle et al.), fig. 2.

    Latents read the inputs (encoder), then themselves (processor); queries read the latents
    (decoder). The cost of reading and answering grows like num_latents * (N + M), not N * M.
    Raises ValueError if latent_dim is not a multiple of num_heads.
    """

    def __init__(self, input_dim, query_dim, output_dim, num_latents=512, latent_dim=512,
                 num_blocks=6, num_heads=8, dropout=0.1):
        super().__init__()
        self.embed_inputs = nn.Linear(input_dim, latent_dim)
        self.embed_queries = nn.Linear(query_dim, latent_dim)
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim) * 0.02)
        self.encoder = Block(latent_dim, num_heads, dropout, cross=True)
        self.processor = nn.ModuleList(Block(latent_dim, num_heads, dropout)
                                       for _ in range(num_blocks))
        self.decoder = Block(latent_dim, num_heads, dropout, cross=True)
        self.norm_out = nn.LayerNorm(latent_dim)
        self.to_values = nn.Linear(latent_dim, output_dim)

    def forward(self, inputs, queries, query_bias=None):
        """inputs (B, N, input_dim), queries (B, M, query_dim) -> (B, M, output_dim).

        query_bias (B, 1, 1): if given, the latents read the queries, too, and this is added to
        their attention logits.
        """
        tokens, queries = self.embed_inputs(inputs), self.embed_queries(queries)
        bias = None
        if query_bias is not None:
            bias = F.pad(query_bias.expand(-1, 1, queries.shape[1]), (tokens.shape[1], 0))
            bias = bias[:, None]                                             # (B, 1, 1, N + M)
            tokens = torch.cat([tokens, queries], dim=1)                     # (B, N + M, dim)
        latents = self.encoder(self.latents.expand(len(tokens), -1, -1), tokens, bias)
        for block in self.processor:
            latents = block(latents)
        return self.to_values(self.norm_out(self.decoder(queries, latents)))


# ------------------------------------------------------------------------------ Gaussian field
def pixel_covariance(images):
    """Second moments of the pixels of images uint8 (N, C, side, side), channels pooled.

    Values in [-1, 1], averaged with the mirror images, scaled to a mean variance of 1.
    Returns float32 (side * side, side * side) on the images' device.
    """
    side = images.shape[-1]
    total = 0
    for part in images.split(1000):
        x = part.flatten(0, 1).flatten(1).float() / 127.5 - 1  # (1000 C, side * side)
        total = total + x.T @ x
    mirror = torch.arange(side * side, device=images.device).view(side, side).flip(1).flatten()
    total = total + total[mirror][:, mirror]
    return total / total.diagonal().mean()


def exponential_covariance(side, length=16 / 31):
    """The textbook alternative exp(-distance / length): (side * side, side * side), diagonal 1."""
    coords = torch.cartesian_prod(*2 * [torch.linspace(0, 1, side)])
    return torch.exp(-(coords[:, None] - coords).norm(dim=-1) / length)


class GaussianField(nn.Module):
    """Posterior mean of an image, given clean and noisy pixels, if it were a Gaussian field.

    Prior of channel c: the mean of its input pixels, plus a field with the covariance
    variance_c * covariance. The observations are x_0 at the input pixels, and at the output pixels
    x_t / sqrt(alpha_bar) = x_0 + noise of variance (1 - alpha_bar) / alpha_bar. E[x_0 | x_in, x_t]
    is the solution of a linear system: Rasmussen & Williams (2006), eq. 2.25. Without x_t this is
    kriging.

    covariance: (P, P) between the P = side * side pixels of the image, mean of the diagonal 1.
    """

    jitter = 1e-3  # white noise at the inputs, in units of the prior's variance: keeps K invertible

    def __init__(self, covariance):
        super().__init__()
        self.register_buffer("covariance", covariance)

    def forward(self, input_indices, input_values, output_indices=None, x_t=None, alpha_bar=None):
        """input_indices (B, N_in), input_values (B, N_in, C): the clean pixels.

        output_indices (B, N_out), x_t (B, N_out, C), alpha_bar (B, 1, 1): the noisy ones, or None.
        Returns (posterior_mean (B, C, P), variance (B, 1, C) of each channel's prior).
        Raises torch.linalg.LinAlgError (a RuntimeError) if the covariance is not positive definite.
        """
        indices = input_indices
        mean = input_values.mean(dim=1, keepdim=True)                        # (B, 1, C)
        y = input_values - mean                                              # (B, N, C)
        noise = torch.full_like(y[..., :1], self.jitter)
        weights = self.solve(indices, y, noise)                              # (B, N, C)
        # maximum likelihood, y^T K^-1 y / N, as if two more pixels of variance 0.05 had been seen:
        # otherwise an image of one colour would have none
        variance = ((y * weights).sum(dim=1, keepdim=True) + 2 * 0.05) / (y.shape[1] + 2)
        if x_t is not None:  # the same with all N = N_in + N_out pixels
            noise_t = (1 - alpha_bar) / (alpha_bar * variance)               # in units of K
            noise = torch.cat([noise.expand_as(y), noise_t.expand_as(x_t)], dim=1)
            y = torch.cat([y, x_t / alpha_bar.sqrt() - mean], dim=1)
            indices = torch.cat([indices, output_indices], dim=1)
            weights = self.solve(indices, y, noise)
        image = weights.new_zeros(len(weights), len(self.covariance), weights.shape[2])
        image = image.scatter_add(1, indices[..., None].expand_as(weights), weights)  # (B, P, C)
        return mean.mT + image.mT @ self.covariance, variance                # eq. 2.25

    def solve(self, indices, y, noise):
        """(K + diag(noise))^-1 y for pixels (B, N), y (B, N, C) and noise (B, N, C or 1)."""
        K = self.covariance[indices[:, :, None], indices[:, None, :]]        # (B, N, N)
        K = K[:, None].repeat(1, noise.shape[2], 1, 1)                       # (B, C or 1, N, N)
        K.diagonal(dim1=2, dim2=3).add_(noise.mT)
        return torch.cholesky_solve(y.mT[..., None], torch.linalg.cholesky(K))[..., 0].mT


# ---------------------------------------------------------------------------------------- U-Net
class UNet(nn.Module):
    """3 x 3 convolutions at full, half, ... resolution, one width for each. Ronneberger et al.

    (B, channels, H, W) -> (B, widths[0], H, W); H and W must be divisible by
    2^(len(widths) - 1). Skip connections are added, not concatenated.
    """

    def __init__(self, channels, widths):
        super().__init__()
        pairs = list(zip(widths, widths[1:]))
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.before = nn.ModuleList(nn.Conv2d(a, a, 3, padding=1) for a in widths)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, stride=2) for a, b in pairs)
        self.bottom = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.after = nn.ModuleList(nn.Conv2d(a, a, 3, padding=1) for a, _ in pairs)

    def forward(self, x):
        x, skips = self.first(x.contiguous(memory_format=torch.channels_last)), []
        for i, before in enumerate(self.before):
            if i > 0:
                x = self.down[i - 1](x.relu())
            x = x + before(x.relu())
            skips.append(x)
        x = x + self.bottom(x.relu())
        for i in reversed(range(len(self.up))):
            x = skips[i] + F.interpolate(self.up[i](x.relu()), scale_factor=2)
            x = x + self.after[i](x.relu())
        return x


# ------------------------------------------------------------------------------------- the model
class NFDenoiser(nn.Module):
    """The neural field: clean values of noisy output pixels, given clean input pixels.

    alphas_cumprod: (T,), from the DiffusionSchedule that x_t is made with. channels: of an image.
    parts: which of PARTS. widths: of the U-Net. side: height and width of the training images.
    covariance: pixel_covariance of the training images; None is exponential_covariance(side).
    perceiver: the sizes of PerceiverIO. Raises ValueError for unknown parts or a
    side that the U-Net cannot halve, and as PerceiverIO does.
    """

    def __init__(self, alphas_cumprod, channels=3, parts=PARTS, widths=(96, 192, 384), side=32,
                 covariance=None, num_fourier_feats=256, **perceiver):
        super().__init__()
        if not parts or set(parts) - set(PARTS):
            raise ValueError(f"parts must be one or more of {', '.join(PARTS)}, got {parts}")
        if "unet" in parts and side % 2 ** (len(widths) - 1):
            raise ValueError(f"side must be divisible by {2 ** (len(widths) - 1)}, got {side}")
        self.side, self.field, self.unet, self.perceiver = side, None, None, None
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().float().cpu())
        if "field" in parts:
            self.field = GaussianField(exponential_covariance(side) if covariance is None
                                       else covariance.detach().float().cpu())
        if "unet" in parts:
            self.unet = UNet(channels + 3, widths)
            self.unet_to_values = nn.Linear(widths[0], channels)
            nn.init.normal_(self.unet_to_values.weight, std=0.01)  # start near the mean
        if "perceiver" in parts:
            self.fourier = FourierFeatures(num_fourier_feats)
            self.embed_time = SinusoidalTimeEmbedding(64)
            input_dim = 2 * num_fourier_feats + channels + 64
            query_dim = input_dim + (widths[0] if self.unet else 0)
            self.perceiver = PerceiverIO(input_dim, query_dim, channels, **perceiver)
            nn.init.normal_(self.perceiver.to_values.weight, std=0.01)
        # brightness, red against blue, green against both (columns, orthonormal): these are hardly
        # correlated, so each gets a variance of its own, small for the last two
        colours = torch.tensor([[1.0, 1, 1], [1, 0, -2], [1, -1, 1]])
        colours = colours / colours.norm(dim=0) if channels == 3 else torch.eye(channels)
        self.register_buffer("colours", colours, persistent=False)

    def forward(self, noisy_output_values, output_coords, t, input_coords, input_values):
        """Predict the clean output values x_0. DDPM's network, for x_0 instead of eps.

        noisy_output_values: x_t (B, N_out, C); or None for pure noise (t = T - 1), so that nothing
        is computed from it. output_coords (B, N_out, 2), input_coords (B, N_in, 2): clamped to
        [0, 1]; the field and the U-Net see the pixels at the nearest grid point.
        t: int64 (B,) in 0..T-1. input_values: (B, N_in, C) in [-1, 1], clean.
        Returns x_0_hat (B, N_out, C). Raises ValueError for other shapes or N_in = 0.
        """
        (B, N_out, _), N_in, C = output_coords.shape, input_coords.shape[1], len(self.colours)
        pure_noise = noisy_output_values is None
        x_t = output_coords.new_zeros(B, N_out, C) if pure_noise else noisy_output_values
        shapes = [tuple(x.shape) for x in (x_t, output_coords, t, input_coords, input_values)]
        needed = [(B, N_out, C), (B, N_out, 2), (B,), (B, N_in, 2), (B, N_in, C)]
        if N_in < 1 or shapes != needed:
            raise ValueError(f"x_t, output_coords, t, input_coords, input_values need the shapes "
                             f"{needed} and at least one input pixel, got {shapes}")
        input_coords, output_coords = input_coords.clamp(0, 1), output_coords.clamp(0, 1)
        alpha_bar = self.alphas_cumprod[t][:, None, None]                    # (B, 1, 1)
        exact = torch.autocast(t.device.type, enabled=False)  # linear algebra needs float32

        # prior: mean and standard deviation of x_0, and what the U-Net sees
        with exact, torch.no_grad():
            x_t, x_in = x_t @ self.colours, input_values @ self.colours
            mean_image, std, image = self.prior(None if pure_noise else x_t, output_coords,
                                                alpha_bar, input_coords, x_in)
            mean = read_at(mean_image, output_coords)                        # (B, N_out, C)
        answer = torch.zeros_like(mean)
        if self.unet:
            features = read_at(self.unet(image), output_coords).relu()       # (B, N_out, widths[0])
            answer = answer + self.unet_to_values(features)

        if self.perceiver:
            # query: coordinates, x_t scaled by sqrt(alpha_bar), time, the U-Net's features
            time = self.embed_time(t)[:, None, :]                            # (B, 1, 64)
            inputs = [self.fourier(input_coords), x_in, time.expand(-1, N_in, -1)]
            query = [self.fourier(output_coords), alpha_bar.sqrt() * x_t,
                     time.expand(-1, N_out, -1), *([features] if self.unet else [])]
            # attention: the bias log(alpha_bar) down-weights noisy pixels
            answer = answer + self.perceiver(torch.cat(inputs, dim=2), torch.cat(query, dim=2),
                                             None if pure_noise else alpha_bar.log())
        with exact:
            return (mean + std * answer.float()) @ self.colours.T

    def prior(self, x_t, output_coords, alpha_bar, input_coords, x_in):
        """What is known before any learning; arguments as in forward, colours rotated.

        Returns the mean image (B, C, side, side), the standard deviation (B, 1, C) of the
        residual, and the U-Net's input (B, C + 3, side, side): the mean image (without a field the
        pixels themselves), where there are input pixels and noisy pixels, and the noise level.
        """
        inputs, outputs = self.grid_index(input_coords), self.grid_index(output_coords)
        if self.field:
            mean_image, variance = self.field(inputs, x_in, outputs, x_t, alpha_bar)
            residual = 0.07 * variance  # about what is left once 20% of the pixels are known
            seen = mean_image - x_in.mean(1)[..., None]
        else:  # the mean colour; the U-Net sees the pixels themselves
            mean_image = x_in.mean(1)[..., None].expand(-1, -1, self.side**2)
            variance = residual = torch.full_like(x_in[:, :1], 0.25)
            seen = scatter(inputs, x_in, self.side**2)
            if x_t is not None:
                seen = seen + scatter(outputs, alpha_bar.sqrt() * x_t, self.side**2)
        # variance of x_0 given x_t, for a Gaussian with the variance `residual`
        std = (residual * (1 - alpha_bar) / (alpha_bar * residual + 1 - alpha_bar)).sqrt()
        image = torch.cat([
            seen / variance.sqrt().mT,
            scatter(inputs, torch.ones_like(x_in[..., :1]), self.side**2),
            scatter(outputs, alpha_bar.expand(-1, outputs.shape[1], 1), self.side**2),
            alpha_bar.sqrt().expand(-1, 1, self.side**2)], dim=1)
        as_image = lambda x: x.unflatten(2, (self.side, self.side))
        return as_image(mean_image), std, as_image(image)

    def grid_index(self, coords):
        """The nearest pixel y * side + x of coords (B, N, 2) in [0, 1]: int64 (B, N)."""
        x, y = (coords * (self.side - 1)).round().long().unbind(-1)
        return y * self.side + x


def scatter(indices, values, pixels):
    """Values (B, N, C) at indices (B, N) of an image, 0 elsewhere: (B, C, pixels).

    Of values with the same index, any one is kept.
    """
    image = values.new_zeros(len(values), values.shape[2], pixels)
    return image.scatter(2, indices[:, None].expand(-1, values.shape[2], -1), values.mT)


def read_at(image, coords):
    """Bilinear interpolation of image (B, C, H, W) at coords (B, N, 2) in [0, 1]: (B, N, C)."""
    grid = 2 * coords[:, :, None] - 1                                        # (B, N, 1, 2)
    return F.grid_sample(image.float(), grid, align_corners=True)[..., 0].mT


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    torch.manual_seed(0)
    for name, config in SIZES.items():
        model = NFDenoiser(torch.linspace(1, 1e-6, 1000), **config)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, namely")
        for part, module in model.named_children():
            print(f"  {part:16}{sum(p.numel() for p in module.parameters()):12,}")
    print("(nothing was written; train.py trains a model)")


@torch.no_grad()
def ddim_sample(model, schedule, output_coords, input_coords, input_values, num_steps=50, eta=0.0,
                generator=None, on_step=None):
    """Denoise Gaussian noise at output_coords step by step, given the input pixels. DDIM, eq. 12.

    Returns (B, N_out, C), not clamped. The options are those of schedule.ddim.
    """
    from schedule import ddim, normal_like

    def denoise(x_t, t):
        return model(x_t, output_coords, t, input_coords, input_values)

    x_T = input_values.new_empty(*output_coords.shape[:2], input_values.shape[2])
    x_T = normal_like(x_T, generator)
    return ddim(denoise, schedule, x_T, num_steps, eta, generator, on_step)


@torch.no_grad()
def ddpm_sample(model, schedule, output_coords, input_coords, input_values, generator=None,
                on_step=None):
    """Ancestral sampling over all T timesteps. DDPM, algorithm 2. Otherwise like ddim_sample."""
    from schedule import ddpm, normal_like

    def denoise(x_t, t):
        return model(x_t, output_coords, t, input_coords, input_values)

    x_T = input_values.new_empty(*output_coords.shape[:2], input_values.shape[2])
    x_T = normal_like(x_T, generator)
    return ddpm(denoise, schedule, x_T, generator, on_step)


if __name__ == "__main__":
    main()
