"""A neural field as a denoiser: scattered pixels in, the colour at any coordinate out.

An image is a set of pixels (coordinate, value). Some are given, clean and fixed (the input); others
start as Gaussian noise and are denoised step by step (the output). The network predicts the clean
output values directly, and is trained on its mean squared error:

    x_0_hat = f(x_t_out, coords_out, t, coords_in, x_in),      loss = mean (x_0_hat - x_0)^2
    x_0_hat = posterior_mean + std * (unet + perceiver)

    input pixels  (B, N_in, 3)  --+--> gaussian   posterior mean (B, 3, 32, 32) of a Gaussian
    noisy outputs (B, N_out, 3) --+      |        random field: linear algebra, nothing is learned
                                  |      v
                                  +--> unet       3 x 3 convolutions on that mean image; their
                                  |      |        features are read at the output coordinates
                                  |      v
                                  +--> perceiver  attention between pixels, stronger where they are
                                                  near and alike: (B, N_out, 3)

Each part can be left out (train.py --parts). python nf_denoiser.py prints their parameters.
Perceiver IO: Jaegle et al. (2021, arXiv 2107.14795). Gaussian Processes for Machine Learning:
Rasmussen & Williams (2006). U-Net: Ronneberger et al. (2015, arXiv 1505.04597).
Needs torch, to sample also schedule.py, to print the sizes data.py: copy it anywhere.
"""
import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

PARTS = ("gaussian", "unet", "perceiver")


# --------------------------------------------------------------------- attention and Perceiver IO
class Attention(nn.Module):
    """Multi-head attention with a notion of distance. Vaswani et al. (2017), eq. 1.

    For vector i, at the place p_i, each head returns a weighted mean of the context's values v_j:

        logits_ij  = (R_i q_i) . (R_j k_j) / sqrt(d) - |p_i - p_j|^2 / (2 reach^2) + log w_j
        weights_ij = exp(logits_ij) / sum_j exp(logits_ij)                        (softmax)
        y_i        = sum_j weights_ij v_j

    The first term says how alike query and key are; R_i (`rotate`) turns pairs of numbers by angles
    that grow with p_i, so that the product depends on p_i - p_j, too. The second makes the weights
    fall with distance like a Gaussian of standard deviation `reach`, one for each head: alone it
    would be kernel regression (Nadaraya, 1964), a mean in which near values count more. The third
    multiplies the weight of j by w_j, since exp(a + log w) = w exp(a): noisy pixels count less.

    x (B, N, dim) attends to context (B, M, dim) -> (B, N, dim). log_w: (B, M) or None. placed=True
    needs coordinates (B, N, 2) and (B, M, 2), and a dim that is a multiple of 4 * num_heads.
    """

    def __init__(self, dim, num_heads, placed=False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        # at first from 0.7 to 4 pixels of an image of 32 x 32
        log_reach = torch.linspace(math.log(0.7 / 31), math.log(4 / 31), num_heads)
        self.log_reach = nn.Parameter(log_reach) if placed else None

    def forward(self, x, context, x_coords=None, context_coords=None, log_w=None):
        split = self.num_heads, -1
        q = self.to_q(x).unflatten(2, split).transpose(1, 2)               # (B, heads, N, d)
        k = self.to_k(context).unflatten(2, split).transpose(1, 2)         # (B, heads, M, d)
        v = self.to_v(context).unflatten(2, split).transpose(1, 2)
        d = q.shape[-1]
        q = q / math.sqrt(d)
        if self.log_reach is not None:
            # -|p_i - p_j|^2 / 2 = p_i . p_j - |p_j|^2 / 2 - |p_i|^2 / 2. The last term is the same
            # for each j: the softmax cancels it. The rest is a dot product, (p_i, 1) . (p_j,
            # -|p_j|^2 / 2), over reach^2: three more columns of q and k, no matrix of distances.
            p = x_coords[:, None] - 0.5        # from the centre: smaller numbers, smaller errors
            p_context = (context_coords[:, None] - 0.5).expand(*k.shape[:3], 2)
            squared = p_context.square().sum(dim=-1, keepdim=True)         # (B, heads, M, 1)
            inverse = torch.exp(-2 * self.log_reach)[:, None, None]        # 1 / reach^2
            one = p.new_ones(*q.shape[:3], 1)
            q = torch.cat([rotate(q, x_coords), inverse * p, one], dim=-1)
            k = torch.cat([rotate(k, context_coords), p_context, -inverse / 2 * squared], dim=-1)
            v = F.pad(v, (0, 3))  # the fast kernels need one width for q, k and v
        if log_w is not None:
            log_w = log_w[:, None, None].to(q)         # (B, 1, 1, M), added to the logits
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round the distances
            y = F.scaled_dot_product_attention(q, k.to(q), v.to(q), attn_mask=log_w, scale=1.0)
        return self.to_out(y[..., :d].transpose(1, 2).flatten(2))          # (B, N, dim)


class PerceiverIO(nn.Module):
    """A set of vectors in, an answer for each query out. Perceiver IO (Jaegle et al.), fig. 2.

    Latents are the vectors that it works on: they read the inputs (encoder), then each other
    (processor); queries read the latents (decoder). Each step is a Block: attention, then an MLP,
    each added to its input.

    num_latents=None (train.py's default): a latent at each input, which starts as that input and
    attends by distance. A number (--size full): so many learned vectors without a place, as in the
    paper; what "near" means they must learn from sines and cosines of the coordinates
    (FourierFeatures). Fewer latents than inputs cost less.
    """

    def __init__(self, input_dim, query_dim, output_dim, num_latents=512, latent_dim=512,
                 num_blocks=6, num_heads=8, dropout=0.1):
        super().__init__()
        placed = num_latents is None
        self.embed_inputs = nn.Linear(input_dim, latent_dim)
        self.embed_queries = nn.Linear(query_dim, latent_dim)
        self.latents = None
        if not placed:
            self.latents = nn.Parameter(torch.randn(num_latents, latent_dim) * 0.02)
        self.encoder = Block(latent_dim, num_heads, dropout, placed, cross=True)
        self.processor = nn.ModuleList(
            Block(latent_dim, num_heads, dropout, placed) for _ in range(num_blocks))
        self.decoder = Block(latent_dim, num_heads, dropout, placed, cross=True)
        self.norm_out = nn.LayerNorm(latent_dim)
        self.to_values = nn.Linear(latent_dim, output_dim)

    def forward(self, inputs, input_coords, queries, query_coords, log_w=None):
        """inputs (B, N, input_dim), queries (B, M, query_dim) -> (B, M, output_dim).

        Coordinates (B, N, 2), (B, M, 2) in [0, 1]. log_w (B, 1), if given: queries describe noisy
        pixels, which the latents read, too, each with its attention weight multiplied by w.
        """
        inputs, queries = self.embed_inputs(inputs), self.embed_queries(queries)
        context, context_coords = inputs, input_coords
        if log_w is not None:
            context = torch.cat([inputs, queries], dim=1)                  # (B, N + M, dim)
            context_coords = torch.cat([input_coords, query_coords], dim=1)
            log_w = log_w.expand(-1, queries.shape[1])                     # (B, M)
            log_w = F.pad(log_w, (inputs.shape[1], 0))                     # 0 for the inputs: w = 1
        latents, latent_coords = inputs, input_coords
        if self.latents is not None:
            latents, latent_coords = self.latents.expand(len(inputs), -1, -1), None
        latents = self.encoder(latents, latent_coords, context, context_coords, log_w)
        for block in self.processor:
            latents = block(latents, latent_coords)
        outputs = self.decoder(queries, query_coords, latents, latent_coords)
        return self.to_values(self.norm_out(outputs))


# ---------------------------------------------------------------- what is known before any learning
class GaussianField(nn.Module):
    """Posterior mean of an image, given clean and noisy pixels, if it were a Gaussian random field.

    The pixels of such a field are jointly normal with covariance K. Say one is seen: y, its value
    less the mean, has noise of variance D. Another is then expected to lie y K(other, seen) /
    (K(seen, seen) + D) above the mean. With several seen, that is a linear system, kriging:

        posterior_mean = K(all, seen) (K(seen, seen) + D)^-1 y      Rasmussen & Williams, eq. 2.23

    with the noise variances of y on the diagonal of D. Attention, too, is a weighted sum of values,
    but with weights that a network finds.

    covariance: (P, P) of the P = side * side pixels, mean of the diagonal 1. That of channel c is
    this times variance_c, estimated from the input pixels; D is in units of variance_c.
    """

    jitter = 1e-3       # D of the clean pixels: keeps K invertible
    unexplained = 0.07  # share of the variance left with 20% of the pixels known; a rough constant

    def __init__(self, covariance):
        super().__init__()
        self.register_buffer("covariance", covariance)

    def forward(self, input_coords, y_in, output_coords, y_t=None, noise_variance=None):
        """y_in (B, N_in, C): the clean pixels less their mean, at coordinates (B, N_in, 2).

        y_t (B, N_out, C): the noisy ones, with noise of variance noise_variance (B, 1, 1), or None.
        Returns posterior means on the grid (B, C, side, side) and at the outputs (B, N_out, C), and
        variance (B, 1, C). Raises torch.linalg.LinAlgError (a RuntimeError) if the covariance is
        not positive definite.
        """
        n_in, coords, y = y_in.shape[1], input_coords, y_in
        if y_t is not None:
            coords = torch.cat([input_coords, output_coords], dim=1)
            y = torch.cat([y_in, y_t], dim=1)
        side = math.isqrt(len(self.covariance))
        # rows K(seen, all pixels); their entries at the seen pixels are K(seen, seen)
        K_seen_all = read_rows(self.covariance, coords.to(y), side)             # (B, N, P)
        K = read_at(K_seen_all.unflatten(2, (side, side)), coords.to(y))        # (B, N, N)
        noise = torch.full_like(y_in, self.jitter)
        weights = solve(K[:, :n_in, :n_in], noise[..., :1], y_in)  # one D for all channels
        quadratic = (y_in * weights).sum(dim=1, keepdim=True)
        variance = likely_variance(quadratic, n_in)  # of each colour: y^T (K + D)^-1 y / N_in
        if y_t is not None:  # the same system with all N = N_in + N_out pixels
            noise_t = (noise_variance / variance).expand_as(y_t)  # D, in units of variance
            weights = solve(K, torch.cat([noise, noise_t], dim=1), y)
        image = (weights.mT @ K_seen_all).unflatten(2, (side, side))            # (B, C, side, side)
        return image, read_at(image, output_coords), variance


# -------------------------------------------------------------------------------------- the model
class NFDenoiser(nn.Module):
    """The neural field: clean values of noisy output pixels, given clean input pixels.

    alphas_cumprod: (T,), from the DiffusionSchedule that x_t is made with. channels: of an image.
    parts: which of PARTS. widths: of the U-Net. side: height and width of the training images.
    covariance: pixel_covariance of the training images; None is exponential_covariance(side).
    perceiver: the sizes of PerceiverIO. ValueError for unknown parts and sizes that do not fit.
    """

    def __init__(self, alphas_cumprod, channels=3, parts=PARTS, widths=(96, 192, 384), side=32,
                 covariance=None, num_fourier_feats=256, **perceiver):
        super().__init__()
        check_parts(parts, widths, side)
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        self.side, self.unet, self.perceiver = side, None, None
        self.posterior = IndependentPixels(side)  # without the Gaussian field: each on its own
        if "gaussian" in parts:
            K = exponential_covariance(side) if covariance is None else covariance
            self.posterior = GaussianField(K.float())
        if "unet" in parts:
            self.unet = UNet(channels + 3, widths)  # 3 planes say what is known: unet_planes
            self.unet_to_values = nn.Linear(widths[0], channels)
            nn.init.normal_(self.unet_to_values.weight, std=0.01)  # start near the posterior mean
        if "perceiver" in parts:
            self.fourier = FourierFeatures(num_fourier_feats)  # sines, cosines of coordinates
            self.embed_time = SinusoidalTimeEmbedding(64)      # sines, cosines of t
            input_dim = 2 * num_fourier_feats + channels + 64
            query_dim = input_dim + (widths[0] if self.unet else 0)
            self.perceiver = PerceiverIO(input_dim, query_dim, channels, **perceiver)
            nn.init.normal_(self.perceiver.to_values.weight, std=0.01)
        # Red, green and blue rise and fall together. Brightness, red against blue, and green
        # against both (columns, orthonormal) do not, so each can have a variance of its own:
        # everything is computed in these colours.
        colours = torch.tensor([[1.0, 1, 1], [1, 0, -2], [1, -1, 1]])
        colours = colours / colours.norm(dim=0) if channels == 3 else torch.eye(channels)
        self.register_buffer("colours", colours, persistent=False)

    def forward(self, noisy_output_values, output_coords, t, input_coords, input_values):
        """Predict the clean output values x_0. DDPM's network, for x_0 instead of eps.

        noisy_output_values: x_t (B, N_out, C); or None for pure noise (t = T - 1), so that nothing
        is computed from it. output_coords (B, N_out, 2), input_coords (B, N_in, 2): clamped to
        [0, 1]. t: (B,) in 0..T-1. input_values: (B, N_in, C) in [-1, 1], clean.
        Returns x_0_hat (B, N_out, C). Raises ValueError for other shapes or N_in = 0.
        """
        x_t, t = noisy_output_values, t.long()
        check_shapes(x_t, output_coords, t, input_coords, input_values, len(self.colours))
        dtype = self.colours.dtype  # float32; numpy gives float64
        input_coords = input_coords.to(dtype).clamp(0, 1)
        output_coords = output_coords.to(dtype).clamp(0, 1)
        alpha_bar = self.alphas_cumprod[t][:, None, None]                  # (B, 1, 1)
        exact = torch.autocast(t.device.type, enabled=False)  # linear algebra needs float32
        with exact, torch.no_grad():
            # 1. What the pixels say without a network: x_0 is about mean + y_out, up to std.
            x_in = input_values.to(dtype) @ self.colours
            mean = x_in.mean(dim=1, keepdim=True)                          # (B, 1, C)
            y_in, y_t = x_in - mean, None
            # DDPM, eq. 4: x_t / sqrt(alpha_bar) = x_0 + noise of this variance in every colour
            noise_variance = (1 - alpha_bar) / alpha_bar
            if x_t is not None:
                y_t = (x_t.to(x_in) @ self.colours) / alpha_bar.sqrt() - mean
            y_image, y_out, variance = self.posterior(input_coords, y_in, output_coords, y_t,
                                                      noise_variance)
            # The given pixels leave the share `unexplained` of x_0's variance, x_t leaves
            # noise_variance. Precisions (1 / variance) add up: both together leave std^2. The
            # corrections, times std, have one size at every t: c_out of Karras et al. (2022).
            std = (1 / (self.posterior.unexplained * variance) + 1 / noise_variance).rsqrt()
            contrast = variance.sqrt()  # (B, 1, C), the standard deviation of each colour

        # 2. What the networks add, in units of std. They see x_t by y_image and y_out.
        correction, features = torch.zeros_like(y_out), []
        if self.unet:
            normalized = y_image / contrast.mT[..., None]                  # (B, C, side, side)
            planes = unet_planes(normalized, input_coords, output_coords, alpha_bar)
            features = [read_at(self.unet(planes), output_coords).relu()]  # (B, N_out, widths[0])
            correction = correction + self.unet_to_values(features[0])
        if self.perceiver:
            time = self.embed_time(t)[:, None, :]                          # (B, 1, 64)

            def describe(coords, y, *more):
                times = time.expand(-1, y.shape[1], -1)
                return torch.cat([self.fourier(coords), y / contrast, times, *more], dim=2)

            inputs = describe(input_coords, y_in)
            queries = describe(output_coords, y_out, *features)
            # a noisy pixel tells less: its weight is multiplied by alpha_bar, its share of signal
            log_w = None if x_t is None else alpha_bar[:, 0].log()
            correction = correction + self.perceiver(inputs, input_coords, queries, output_coords,
                                                     log_w)
        with exact:  # 3. x_0_hat = posterior_mean + std * (unet + perceiver), as RGB
            return (mean + y_out + std * correction.float()) @ self.colours.T


# ------------------------------------------------------------------------------ loss and sampling
def nf_loss(model, schedule, split, pure_noise, rows=slice(None)):
    """DDPM, algorithm 1, for x_0 instead of eps: mean (x_0_hat - x_0)^2 for one draw of t and eps.

    split: from data.sparse_split. pure_noise: t = T - 1, where x_t says nothing; this trains the
    one-step mean. Otherwise t is uniform in 0..T-1, as sampling needs it, but only 1 of 1,000 such
    draws is at T - 1: so train.py trains with both, each with half of the batch.
    rows: the images to use. t and eps are drawn for the whole split, so that processes that share
    it (torchrun) draw the same numbers as one process alone.
    """
    x_0, T = split["output_values"], schedule.timesteps
    first = T - 1 if pure_noise else 0  # randint(T - 1, T) can only give T - 1
    t = torch.randint(first, T, (len(x_0),), device=x_0.device)
    x_t = None
    if not pure_noise:
        x_t = schedule.q_sample(x_0, t, noise=torch.randn_like(x_0))[rows]
    x_0_hat = model(x_t, split["output_coords"][rows], t[rows], split["input_coords"][rows],
                    split["input_values"][rows])
    return F.mse_loss(x_0_hat, x_0[rows])


@torch.no_grad()
def one_step_mean(model, schedule, output_coords, input_coords, input_values):
    """The estimate of E[x_0 | x_in]: the prediction at t = T - 1, without x_t: (B, N_out, C).

    output_coords (B, N_out, 2), input_coords (B, N_in, 2), input_values (B, N_in, C) in [-1, 1].
    It is the mean of two, for the pixels as they are and for their mirror image: + 0.04 dB.
    """
    t = torch.full((len(input_values),), schedule.timesteps - 1, device=input_values.device)
    x_0_hat = model(None, output_coords, t, input_coords, input_values)
    mirrored = model(None, mirror(output_coords), t, mirror(input_coords), input_values)
    return (x_0_hat + mirrored) / 2


def ddim_sample(model, schedule, output_coords, input_coords, input_values, num_steps=50, eta=0.0,
                device=None, generator=None, on_step=None):
    """Draw output values (B, N_out, C): from Gaussian noise at output_coords, by schedule.ddim.

    Arguments and errors are those of one_step_mean and of schedule.ddim. Not clamped. device is
    accepted and ignored: values are drawn where input_values are.
    """
    from schedule import ddim, normal_like

    def denoise(x_t, t):
        return model(x_t, output_coords, t, input_coords, input_values)

    like = input_values[:, :1].expand(-1, output_coords.shape[1], -1)      # (B, N_out, C)
    x_T = normal_like(like, generator)
    return ddim(denoise, schedule, x_T, num_steps, eta, generator, on_step)


# ========== below: block, embeddings, U-Net, independent pixels, points and pixels, sizes
class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to its input.

    x (B, N, dim) attends to context (B, M, dim), or to itself if that is None -> (B, N, dim).
    """

    def __init__(self, dim, num_heads, dropout=0.0, placed=False, cross=False):
        super().__init__()
        self.norm_x = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if cross else None
        self.attention = Attention(dim, num_heads, placed)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(),
            nn.Linear(2 * dim, dim), nn.Dropout(dropout))

    def forward(self, x, x_coords=None, context=None, context_coords=None, log_w=None):
        y = self.norm_x(x)
        if context is None:
            y = self.attention(y, y, x_coords, x_coords)
        else:
            y = self.attention(y, self.norm_context(context), x_coords, context_coords, log_w)
        x = x + y
        return x + self.mlp(self.norm_mlp(x))


class FourierFeatures(nn.Module):
    """gamma(v) = [sin(2 pi B v), cos(2 pi B v)], Tancik et al. (2020), arXiv 2006.10739, eq. 5.

    From bare coordinates a network learns smooth functions first and fine detail very slowly.
    Sines and cosines of many frequencies give it the detail to choose from.

    (..., 2) coordinates in [0, 1] -> (..., 2 * num_feats). B is drawn once from a Gaussian with
    standard deviation `scale` (cycles per image side) and saved with the weights.
    """

    def __init__(self, num_feats, scale=2.0):
        super().__init__()
        self.register_buffer("B", torch.randn(2, num_feats) * scale)

    def forward(self, coords):
        # not a matrix product: under bf16 autocast that would round the angles
        angle = 2 * math.pi * (coords[..., None] * self.B).sum(dim=-2)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class SinusoidalTimeEmbedding(nn.Module):
    """Sines and cosines of t at falling frequencies. Vaswani et al. (2017), section 3.5.

    (B,) timesteps -> (B, dim) in [-1, 1]; dim is even.
    """

    def __init__(self, dim):
        super().__init__()
        exponents = torch.arange(dim // 2) / (dim // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * exponents))

    def forward(self, t):
        angle = t[:, None].float() * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


def rotate(x, coords):
    """Rotary embedding in two dimensions. Su et al. (2021), arXiv 2104.09864, section 3.2.

    Pairs of numbers are turned by angles that grow with the coordinates: half of them with x, half
    with y, at wavelengths from 0.08 to 1.3 of the image's side. The dot product of two vectors
    then depends on where they are to each other: a query can look for "two pixels to the left".

    x (B, heads, N, d), coords (B, N, 2) -> (B, heads, N, d).
    """
    first, last = math.log10(0.08), math.log10(1.3)
    wavelengths = torch.logspace(first, last, x.shape[-1] // 4, device=coords.device)
    angle = 2 * math.pi * coords[..., None] / wavelengths                  # (B, N, 2, d / 4)
    angle = angle.flatten(2)[:, None]                                      # (B, 1, N, d / 2)
    # a pair as a complex number is turned by a product with exp(i angle)
    pairs = torch.view_as_complex(x.to(angle.dtype).unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


class UNet(nn.Module):
    """3 x 3 convolutions at full, half, ... resolution, one width for each. Ronneberger et al.

    At half the resolution the same nine weights reach twice as far.

    (B, channels, H, W) -> (B, widths[0], H, W); H and W must be divisible by
    2^(len(widths) - 1). Skip connections are added, not concatenated.
    """

    def __init__(self, channels, widths):
        super().__init__()
        conv = lambda a, b, stride=1: nn.Conv2d(a, b, 3, stride, padding=1)
        pairs = list(zip(widths, widths[1:]))
        self.first = conv(channels, widths[0])
        self.before = nn.ModuleList(conv(a, a) for a in widths)
        self.down = nn.ModuleList(conv(a, b, stride=2) for a, b in pairs)
        self.bottom = conv(widths[-1], widths[-1])
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.after = nn.ModuleList(conv(a, a) for a, _ in pairs)

    def forward(self, x):
        x = self.first(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for i, before in enumerate(self.before):
            if i > 0:
                x = self.down[i - 1](x.relu())
            x = x + before(x.relu())
            skips.append(x)
        x = x + self.bottom(x.relu())
        for i in reversed(range(len(self.up))):
            x = self.up[i](x.relu())
            x = skips[i] + F.interpolate(x, scale_factor=2)
            x = x + self.after[i](x.relu())
        return x


def unet_planes(picture, input_coords, output_coords, alpha_bar):
    """What the U-Net sees: picture (B, C, side, side), and three planes that say how sure it is.

    They are 1 at the inputs, alpha_bar (B, 1, 1) at the outputs, and sqrt(alpha_bar) everywhere.
    Returns (B, C + 3, side, side).
    """
    side = picture.shape[-1]
    ones = torch.ones_like(input_coords[..., :1])
    input_plane = scatter(input_coords, ones, side)
    output_plane = scatter(output_coords, alpha_bar * torch.ones_like(output_coords[..., :1]), side)
    noise_level = alpha_bar.sqrt()[..., None].expand_as(input_plane)
    return torch.cat([picture, input_plane, output_plane, noise_level], dim=1)


class IndependentPixels(nn.Module):
    """The posterior of GaussianField if no pixel said anything about another.

    The covariance is then the identity, and each pixel is on its own: a noisy value shrinks towards
    the mean by the factor variance / (variance + noise). Used where the Gaussian field is left out.
    """

    unexplained = 0.36  # of a pixel's variance, once its neighbours are known

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, input_coords, y_in, output_coords, y_t=None, noise_variance=None):
        """Arguments and results are those of GaussianField."""
        squared = y_in.square().sum(dim=1, keepdim=True)
        variance = likely_variance(squared, y_in.shape[1])
        y_out = y_in.new_zeros(*output_coords.shape[:2], y_in.shape[2])
        coords, values = input_coords, y_in
        if y_t is not None:
            y_out = variance / (variance + noise_variance) * y_t
            coords = torch.cat([output_coords, input_coords], dim=1)
            values = torch.cat([y_out, y_in], dim=1)
        return scatter(coords, values, self.side), y_out, variance


def pixel_covariance(images):
    """Second moments of the pixels of images uint8 (N, C, side, side), channels pooled.

    Values in [-1, 1], averaged with the mirror images, scaled to a mean variance of 1. It starts as
    if 300 images with exponential_covariance had been seen: from few or equal ones alone it would
    be worse than that, or could not be inverted. With 50,000 images it makes no difference.
    Returns float32 (side * side, side * side) on the images' device.
    """
    side = images.shape[-1]
    total = 300 * exponential_covariance(side).to(images.device)
    for part in images.split(1000):
        x = part.flatten(0, 1).flatten(1).float() / 127.5 - 1              # (1000 C, side * side)
        total = total + x.T @ x
    mirrored = total.view(side, side, side, side).flip(1, 3)
    total = total + mirrored.view_as(total)
    return total / total.diagonal().mean()


def exponential_covariance(side, length=16 / 31):
    """The textbook alternative exp(-distance / length): (side * side, side * side), diagonal 1."""
    line = torch.linspace(0, 1, side)
    coords = torch.cartesian_prod(line, line)
    return torch.exp(-(coords[:, None] - coords).norm(dim=-1) / length)


def likely_variance(quadratic, count):
    """Maximum likelihood, y^T K^-1 y / N, as if two more pixels of variance 0.05 had been seen.

    Without them an image of one colour would have the variance 0.
    """
    return (quadratic + 2 * 0.05) / (count + 2)


def solve(K, noise, y):
    """(K + D)^-1 y for K (B, N, N), y (B, N, C), D of diagonal noise: (B, N, C), or (B, N, 1)."""
    K = K[:, None].repeat(1, noise.shape[2], 1, 1)                         # (B, C or 1, N, N)
    K.diagonal(dim1=2, dim2=3).add_(noise.mT)
    factor = torch.linalg.cholesky(K)
    return torch.cholesky_solve(y.mT[..., None], factor)[..., 0].mT


def read_rows(matrix, coords, side):
    """Rows of matrix (side * side, D), one for each pixel, at coords (B, N, 2): (B, N, D).

    Between pixels bilinear interpolation, as in read_at, which would take longer.
    """
    place = coords.flatten(0, 1) * (side - 1)
    low = place.floor().clamp(max=side - 2)
    x, y = (place - low).unbind(1)                                         # (B * N,), 0 to 1
    column, row = low.long().unbind(1)
    first = row * side + column
    corners = torch.stack([first, first + 1, first + side, first + side + 1], dim=1)
    left, right = 1 - x, x
    above, below = 1 - y, y
    weights = torch.stack([left * above, right * above, left * below, right * below], dim=1)
    rows = F.embedding_bag(corners, matrix, per_sample_weights=weights, mode="sum")
    return rows.unflatten(0, coords.shape[:2])


def scatter(coords, values, side):
    """Values (B, N, C) at the pixels nearest to coords, 0 elsewhere: (B, C, side, side).

    Of values with the same pixel, any one is kept.
    """
    values = values.mT                                                     # (B, C, N)
    column, row = (coords * (side - 1)).round().long().unbind(-1)
    indices = row * side + column
    image = values.new_zeros(*values.shape[:2], side * side)
    image = image.scatter(2, indices[:, None].expand_as(values), values)
    return image.unflatten(2, (side, side))


def mirror(coords):
    """Coordinates (B, N, 2) of the image flipped from left to right."""
    x, y = coords.unbind(-1)
    return torch.stack([1 - x, y], dim=-1)


def read_at(image, coords):
    """Bilinear interpolation of image (B, C, H, W) at coords (B, N, 2) in [0, 1]: (B, N, C)."""
    grid = 2 * coords[:, :, None] - 1                                      # (B, N, 1, 2)
    return F.grid_sample(image.to(grid), grid, align_corners=True)[..., 0].mT


def check_parts(parts, widths, side):
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts must be one or more of {', '.join(PARTS)}, got {parts}")
    if "unet" in parts and side % 2 ** (len(widths) - 1):
        raise ValueError(f"side must be divisible by {2 ** (len(widths) - 1)}, got {side}")


def check_shapes(x_t, output_coords, t, input_coords, input_values, channels):
    """Raises ValueError unless the arguments of NFDenoiser.forward fit together."""
    B, N_out = (*output_coords.shape, 0, 0)[:2]
    N_in = (*input_coords.shape, 0, 0)[1]
    needed = [(B, N_out, 2), (B,), (B, N_in, 2)]
    needed += [(B, N_in, channels), (B, N_out, channels)]
    given = [output_coords, t, input_coords, input_values, x_t]
    shapes = [tuple(x.shape) for x in given if x is not None]
    if N_in < 1 or shapes != needed[:len(shapes)]:
        raise ValueError(f"output_coords, t, input_coords, input_values, x_t (if given) need the "
                         f"shapes {needed} and at least one input pixel, got {shapes}")


SIZES = {  # --size; "full" has the Perceiver IO of the original design
    "small": dict(widths=(48, 96, 128), num_latents=None, latent_dim=64, num_fourier_feats=16,
                  num_blocks=1, num_heads=4, dropout=0.0),
    "medium": dict(widths=(64, 128, 192), num_latents=None, latent_dim=96, num_fourier_feats=16,
                   num_blocks=2, num_heads=6, dropout=0.0),
    "full": dict(widths=(96, 192, 384), num_latents=512, latent_dim=512, num_fourier_feats=256,
                 num_blocks=6, num_heads=8, dropout=0.1),
}


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    torch.manual_seed(0)
    for size, config in SIZES.items():
        model = NFDenoiser(torch.linspace(1, 1e-6, 1000), **config)
        for name, module in [(f"{size}:", model), *model.named_children()]:
            print(f"{name:16}{sum(p.numel() for p in module.parameters()):12,} parameters")
    print("(nothing was written; train.py trains a model)")


if __name__ == "__main__":
    from data import run
    run(main)
