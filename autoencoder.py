"""A denoising autoencoder: an MLP that gives back the clean image, whatever was done to the one it sees.

    encode  z = f(y)          784 -> 256 -> 128 -> 64       y: the corrupted image
    decode  x_hat = g(z)       64 -> 128 -> 256 -> 784
    loss    mean (x_hat - x)^2                              x: the CLEAN image

Were the loss against y, the noise itself would be worth copying. Against x, what is worth keeping in 64 numbers is what
the noise cannot forge: the structure that clean images share. A plain autoencoder is the same network with y = x.
After Vincent et al., "Extracting and Composing Robust Features with Denoising Autoencoders" (ICML 2008).

    python autoencoder.py                  # the layers, parameters and images per second
    python train.py --model dae            # train one; --model ae is its control

This file needs nothing but torch: copy it anywhere.
"""
import argparse
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class DenoisingAutoencoder(nn.Module):
    """input_dim-256-128-latent_dim-128-256-input_dim, ReLU between, sigmoid at the end. Vincent et al. (2008), sec. 2.

    Images go in and come out as (B, input_dim) or any (B, ...) with input_dim values each, in [0, 1].
    """

    def __init__(self, input_dim=784, latent_dim=64):
        super().__init__()
        self.input_dim = input_dim
        self.encoder = nn.Sequential(nn.Linear(input_dim, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
                                     nn.Linear(128, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(),
                                     nn.Linear(256, input_dim), nn.Sigmoid())

    def encode(self, x):
        """(B, ...) with input_dim values in [0, 1] -> latent (B, latent_dim). ValueError for another size."""
        if x.flatten(1).shape[1] != self.input_dim:
            raise ValueError(f"the autoencoder takes {self.input_dim} values an image, got shape {tuple(x.shape)}")
        return self.encoder(x.flatten(1))

    def decode(self, latent):
        """latent (B, latent_dim) -> images (B, input_dim) in [0, 1]."""
        return self.decoder(latent)

    def forward(self, x):
        """Corrupted images (B, ...) in [0, 1] -> (reconstructed, shaped like x, in [0, 1]; latent (B, latent_dim))."""
        latent = self.encode(x)
        return self.decode(latent).view_as(x), latent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.error = fail
    args = parser.parse_args()
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")

    torch.manual_seed(0)
    model, images = DenoisingAutoencoder(), torch.rand(args.batch_size, 784)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            print(f"{name:10}  {layer.in_features:4d} -> {layer.out_features:4d}  "
                  f"{sum(p.numel() for p in layer.parameters()):9,} parameters")
    print(f"{'in all':25}{sum(p.numel() for p in model.parameters()):9,} parameters")

    def images_per_second(work):
        for _ in range(3):
            work()
        start, rounds = time.perf_counter(), 0
        while time.perf_counter() - start < 1:
            work()
            rounds += 1
        return rounds * args.batch_size / (time.perf_counter() - start)

    with torch.no_grad():
        print(f"forward             {images_per_second(lambda: model(images)):9,.0f} images/s")
    print(f"forward + backward  {images_per_second(lambda: F.mse_loss(model(images)[0], images).backward()):9,.0f} images/s")
    print(f"(batches of {args.batch_size}, {torch.get_num_threads()} threads; nothing was written)")


def fail(message):
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        fail(problem)
