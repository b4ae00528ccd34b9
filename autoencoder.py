"""A denoising autoencoder: an MLP that gives back the clean image, whatever was done to the one it sees.

    encode  z = f(y)          784 -> 256 -> 128 -> 64       y: the corrupted image
    decode  x_hat = g(z)       64 -> 128 -> 256 -> 784
    loss    mean (x_hat - x)^2                              x: the CLEAN image

Were the loss against y, the noise itself would be worth copying. Against x, what is worth keeping in 64 numbers is what
the noise cannot forge: the structure that clean images share. A plain autoencoder is the same network with y = x.
After Vincent et al., "Extracting and Composing Robust Features with Denoising Autoencoders" (ICML 2008).

    python autoencoder.py                      # the layers and parameters; --bench: images per second
    python train.py --model dae                # train one; --model ae is its control
    python autoencoder.py --exercise compare   # the lab: compare, levels, types, features, progressive, blind or all

The class and train_autoencoder need nothing but torch: copy them anywhere. The lab uses the files beside this one.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
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
        for layer in (*self.encoder, *self.decoder):
            if isinstance(layer, nn.Linear):  # the ReLU before a layer halves, this doubles: He et al. (2015), eq. 10
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.xavier_normal_(self.decoder[-2].weight)  # smaller, so that the bias rules at first: Glorot (2010), eq. 12

    @torch.no_grad()
    def start_at(self, images):
        """Make the untrained network answer about the mean of images, (N, ...) with input_dim values each in [0, 1].

        It is the best constant answer, so that training need not look for it. RuntimeError for another size.
        """
        self.decoder[-2].bias.copy_(images.flatten(1).mean(0).clamp(0.01, 0.99).logit())

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


def train_autoencoder(images, corrupt, epochs, seed, lr=6e-3, batch_size=512, on_epoch=lambda: None):
    """A DenoisingAutoencoder trained to turn corrupt(images, generator) into images. Vincent et al. (2008), section 2.

    images: float (N, D) in [0, 1], on the device to train on. corrupt: (clean, generator) -> noisy, asked anew for
    every batch, so that no noise is seen twice. on_epoch() is called after each time through the images. The seed
    decides weights, order and noise. Returns the model, frozen. Raises ValueError if the loss is not finite.
    """
    torch.manual_seed(seed)
    model = DenoisingAutoencoder(images.shape[1]).to(images.device)
    model.start_at(images)
    generator = torch.Generator(images.device).manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    batches = max(1, len(images) // batch_size)
    steps = epochs * batches
    for step in range(steps):
        place = step % batches
        if place == 0:
            order = torch.randperm(len(images), generator=generator, device=images.device)
        # Straight up over the first 10%, lest big first steps push ReLUs below 0 for good; then half a cosine down to 0,
        # which does what averaging the weights would.
        rate = lr * min(1, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        clean = images.index_select(0, order[place * batch_size:(place + 1) * batch_size])  # twice as fast as images[...]
        loss = F.mse_loss(model(corrupt(clean, generator))[0], clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if place == batches - 1:
            if not math.isfinite(loss.item()):
                raise ValueError(f"the loss is no longer finite after {step + 1:,} steps: lr {lr:g} is too high")
            on_epoch()
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------- the lab
#
# An exercise is a function of `lab`, which main() builds: images and test_images (N, 784) in [0, 1], labels and
# test_labels; noises {name: (images, strength, generator) -> noisy}; models {(noise, strength): one for every seed};
# and the drawing functions of the neighbouring files. It returns (figures for --json, picture, sentences). What a
# sentence says is chosen by the figures, so that it can come out as "no".

CLEAN, DAE, MIXED = ("clean", 0), ("gaussian", 0.3), ("mixed", 0)  # what models are trained on: (noise, strength)
SPECIALISTS = [DAE, ("salt_pepper", 0.2), ("masking", 0.3)]
LEVELS = [("gaussian", level) for level in (0.1, 0.2, 0.3, 0.4, 0.5)]


def title(kind):
    return f"{kind[0].replace('_', ' ')} {kind[1]:g}" if kind[1] else kind[0]


def spoil(lab, images, *kinds, seed=0):
    """Images under each (noise, strength) in turn, the same noise for the same seed."""
    generator = torch.Generator(images.device).manual_seed(seed)
    for name, strength in kinds:
        images = lab.noises[name](images, strength, generator)
    return images


def errors(lab, noisy, kind=None):
    """MSE on the test images of every model trained on `kind`, or of leaving the images alone: (seeds,)."""
    restored = [model(noisy)[0] for model in lab.models[kind]] if kind else [noisy] * lab.seeds
    return torch.stack([F.mse_loss(x, lab.test_images) for x in restored]).cpu()


def duel(a, b):
    return f"{a.mean():.4f} against {b.mean():.4f}, lower in {int((a < b).sum())} of {len(a)} seeds"


def tiles(lab, noisy, kinds, i):
    """Test image i clean, spoilt, restored by the first model of each kind, and the errors of those as heat maps."""
    clean, *seen = (x[i] for x in (lab.test_images, noisy, *(lab.models[kind][0](noisy)[0] for kind in kinds)))
    return [x.view(1, 28, 28) for x in (clean, *seen)] + [lab.heat((x - clean).view(1, 28, 28)) for x in seen[1:]]


def table(heading, rows, columns, figures):
    """Print figures (rows, columns, seeds) as mean and standard deviation over the seeds; return them for --json."""
    mean, std = figures.mean(-1).tolist(), figures.std(-1, correction=min(1, figures.shape[-1] - 1)).tolist()
    show = lambda m, s: f"{m:.5f} ±{s:.5f}" if m < 1 else f"{m:.2f} ±{s:.2f}"
    cells = [list(map(show, *line)) for line in zip(mean, std)]
    left, width = (2 + max(map(len, texts)) for texts in (rows, columns + sum(cells, [])))
    print(heading)
    for row, line in [("", columns), *zip(rows, cells)]:
        print(f"{row:{left}}" + "".join(f"{cell:>{width}}" for cell in line))
    return {row: {column: dict(mean=mean[i][j], std=std[i][j], seeds=figures[i, j].tolist())
                  for j, column in enumerate(columns)} for i, row in enumerate(rows)}


def compare(lab):
    """The plain autoencoder (AE) beside the denoising one (DAE), on clean and on spoilt images."""
    kinds, figures, rows = [CLEAN, *SPECIALISTS], [], []
    for noisy in (spoil(lab, lab.test_images, kind) for kind in kinds):
        mse = torch.stack([errors(lab, noisy), errors(lab, noisy, CLEAN), errors(lab, noisy, DAE)])
        figures.append(torch.cat([mse, -10 * mse[1:].log10()]))
        rows += [tiles(lab, noisy, [DAE, CLEAN], i) for i in (0, 1)]
    names, sentences = [title(kind) for kind in kinds], []
    said = table(f"Trained on clean images (AE) and on {title(DAE)} (DAE): MSE before and after, PSNR in dB", names,
                 ["MSE before", "MSE AE", "MSE DAE", "PSNR AE", "PSNR DAE"], torch.stack(figures))
    for model, mine, other in (("plain", 1, 2), ("denoising", 2, 1)):
        won = [(name, f) for name, f in zip(names, figures) if f[mine].mean() < f[other].mean()]
        wins = "; ".join(f"{name} ({duel(f[mine], f[other])})" for name, f in won)
        sentences.append(f"The {model} autoencoder is better on {wins or 'nothing'}.")
    labels = [label for name in names for label in (name, "")]
    picture = lab.image_grid(rows, ["clean", "input", "DAE", "AE", "DAE error", "AE error"], labels, zoom=3)
    return said, picture, sentences


def matrix(lab, kinds):
    """A model for each noise (down), tested on every noise (across): does one transfer to another?"""
    names, inputs = [title(kind) for kind in kinds], [spoil(lab, lab.test_images, kind) for kind in kinds]
    rows = [f"trained on {name}" for name in names]
    figures = torch.stack([torch.stack([errors(lab, noisy, kind) for noisy in inputs]) for kind in [*kinds, None]])
    said = table("MSE on the test images", [*rows, "left alone"], [f"on {name}" for name in names], figures)
    mse = figures[:-1].mean(-1)
    excess = 100 * (mse / mse.min(0).values - 1)  # in % of the best model for that noise
    shade = (1 + excess / 10).log()  # so that both 5% and 500% can be told from 0
    picture = lab.image_grid([[lab.heat(e.expand(1, 28, 28), 1.2 * shade.max() + 0.01) for e in line] for line in shade],
                             [f"on {name}" for name in names], rows,
                             [[f"{m:.4f} +{e:.0f}%" for m, e in zip(*line)] for line in zip(mse, excess)])
    best, away = mse.argmin(0).tolist(), (excess.sum(1) - excess.diag()) / (len(kinds) - 1)
    others = [f"; for {names[i]} it is {names[k]}" for i, k in enumerate(best) if i != k]
    return said, picture, [
        f"The best model for a noise is the one trained on it in {len(kinds) - len(others)} of {len(kinds)} cases"
        f"{''.join(others)}.",
        f"Away from its own noise {names[away.argmin()]} does best, on average {away.min():.0f}% above the best model "
        f"there; {names[away.argmax()]} does worst, {away.max():.0f}%."]


def levels(lab):
    """Is there a best strength of Gaussian noise to train at, and does heavy noise teach to clean light noise?"""
    said, picture, sentences = matrix(lab, LEVELS)
    light = spoil(lab, lab.test_images, LEVELS[0])
    after, before = errors(lab, light, LEVELS[-1]), errors(lab, light)
    verdict = "cleans" if after.mean() < before.mean() else "does not clean"
    return said, picture, [*sentences, f"Training on {title(LEVELS[-1])} {verdict} {title(LEVELS[0])}: MSE after and "
                                       f"before {duel(after, before)}."]


def linear_classifier(features, labels, classes=10):
    """Logistic regression, penalty |W|^2 / 2N. Features (N, D), labels (N,) -> a function, features -> labels."""
    # One scale for all: a pixel that is almost always black would else drown the others as soon as there is noise.
    shift, scale = features.mean(0), features.var(0).mean().sqrt() + 1e-8
    layer, x = nn.Linear(features.shape[1], classes).to(features.device), (features - shift) / scale
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), labels) + layer.weight.square().sum() / (2 * len(x))
        value.backward()
        return value

    optimizer.step(loss)
    return lambda features: layer((features - shift) / scale).argmax(1)


def features(lab):
    """What the first layer looks at, how correlated the latents are, and what a linear classifier makes of them."""
    noisy, sizes = spoil(lab, lab.test_images, DAE), sorted({min(n, len(lab.images)) for n in (100, 1000, 60_000)})
    names, columns = ["AE", "DAE", "pixels"], ["mean |r|", *(f"{n:,} {x}" for n in sizes for x in ("clean", "noisy"))]
    figures, progress = torch.zeros(3, len(columns), lab.seeds), progress_line(3 * lab.seeds)
    for seed in range(lab.seeds):
        order = torch.randperm(len(lab.images), generator=torch.Generator().manual_seed(seed)).to(lab.images.device)
        encoders = [lab.models[CLEAN][seed].encode, lab.models[DAE][seed].encode, lambda images: images]
        for row, encode in enumerate(encoders):
            z, tests = encode(lab.images), [encode(lab.test_images), encode(noisy)]
            r = torch.corrcoef(tests[0].T).fill_diagonal_(math.nan).abs()  # that of a pixel always black is nan, too
            scores = [r.nanmean()]
            for n in sizes:
                classify = linear_classifier(z[order[:n]], lab.labels[order[:n]])
                scores += [(classify(test) == lab.test_labels).float().mean() for test in tests]
            figures[row, :, seed] = 100 * torch.stack(scores)
            progress(f"classifiers on {names[row]}, seed {seed}")
    said = table(f"In %: mean correlation of two features; accuracy of a linear classifier, by number of labels, on\n"
                 f"clean test images and under {title(DAE)}", names, columns, figures)
    mean, mosaics = figures.mean(-1), []
    for kind in (CLEAN, DAE):  # of the 256 pictures that the first layer multiplies its input with, the 64 that say most
        layer = lab.models[kind][0].encoder[0]
        activity = layer(lab.test_images).relu().std(0)  # 0 for a unit that never fires
        weight = layer.weight[activity.argsort(descending=True)[:64]].view(8, 8, 28, 28)
        weight = F.pad(0.5 + 0.5 * weight / weight.abs().amax((2, 3), keepdim=True), (0, 1, 0, 1), value=1)
        mosaics.append(weight.transpose(1, 2).reshape(1, 8 * 29, 8 * 29))
    picture = lab.image_grid([mosaics], ["first layer of the AE", "first layer of the DAE"], zoom=2)
    drop, few, higher = figures[:, -2] - figures[:, -1], mean[:, 1], int((figures[1, 1] > figures[0, 1]).sum())
    closer, lost = int((figures[1, 0] > figures[0, 0]).sum()), drop.mean(-1)
    return said, picture, [
        f"The denoising latents are more correlated than the plain ones in {closer} of {lab.seeds} seeds, and more robust in "
        f"{int((drop[1] < drop[0]).sum())}: noise costs {lost[1]:.1f} points of accuracy against {lost[0]:.1f} (pixels: "
        f"{lost[2]:.1f}).",
        f"They transfer {'better' if higher == lab.seeds else 'no better for certain'}: with {sizes[0]} labels "
        f"{few[1]:.1f}% against {few[0]:.1f}%, higher in {higher} of {lab.seeds} seeds (pixels: {few[2]:.1f}%)."]


def progressive(lab, passes=10, little=0.1):
    """A heavily spoilt image through the DAE again and again, with or without a little noise before each pass."""
    noisy = spoil(lab, lab.test_images, ("gaussian", 0.5), ("masking", 0.3))
    names, figures, rows = ["nothing added", f"noise {little:g} added"], torch.zeros(passes + 1, 2, lab.seeds), []
    for j, strength in enumerate((0, little)):
        for seed, model in enumerate(lab.models[DAE]):
            seen = [noisy]
            for i in range(passes):
                seen.append(model(spoil(lab, seen[-1], ("gaussian", strength), seed=i + 1))[0])
            figures[:, j, seed] = torch.stack([F.mse_loss(x, lab.test_images) for x in seen])
            if seed == 0:
                rows += [[x[i].view(1, 28, 28) for x in (lab.test_images, *seen)] for i in (0, 1)]
    numbers, mean = range(passes + 1), figures.mean(-1)
    said = table("Gaussian 0.5, then masking 0.3: MSE", ["input", *(f"pass {i}" for i in numbers[1:])], names, figures)
    grid = lab.image_grid(rows, ["clean", "input", *map(str, numbers[1:])], [names[0], "", names[1], ""], zoom=2)
    curves = {name: (numbers, y.tolist()) for name, y in zip(names, mean.T)}
    chart = lab.line_chart("MSE after each pass (log scale)", curves, log_y=True)
    picture = Image.new("RGB", (grid.width, grid.height + chart.height), "white")
    picture.paste(grid, (0, 0))
    picture.paste(chart, (0, grid.height))
    plain, noised = mean.argmin(0).tolist()
    later = 2 + mean[2:, 0].argmin().item()  # the best of those that are an iteration
    added, alone = figures[noised, 1], figures[plain, 0]
    return said, picture, [
        f"Iteration {'helps' if plain > 1 else 'does not help'}: best after {plain} of {passes} passes. MSE of pass "
        f"{later} and of pass 1: {duel(figures[later, 0], figures[1, 0])}.",
        f"Noise before each pass {'helps' if added.mean() < alone.mean() else 'does not help'}: the best with it (after"
        f" {noised}) and without it: {duel(added, alone)}."]


def blind(lab):
    """One model for all noises beside the specialists: on theirs, on combinations, on a noise that none has seen."""
    gaussian, salt_pepper, masking = SPECIALISTS
    tests = [[gaussian], [salt_pepper], [masking], [masking, gaussian], [gaussian, salt_pepper], [("stripes", 0)]]
    names, kinds = [" then ".join(map(title, test)) for test in tests], [MIXED, *SPECIALISTS]
    inputs = [spoil(lab, lab.test_images, *test) for test in tests]
    figures = torch.stack([torch.stack([errors(lab, noisy, kind) for kind in [None, *kinds]]) for noisy in inputs])
    heads = ["left alone", "blind", *map(title, SPECIALISTS)]
    said = table("Test MSE of a model trained on mixed noise (blind) and of the specialists", names, heads, figures)
    short = ["blind", "gauss", "salt", "mask"]
    picture = lab.image_grid([tiles(lab, noisy, kinds, 0) for noisy in inputs],
                             ["clean", "input", *short, *(f"{name} error" for name in short)], names, zoom=3)
    mean = figures.mean(-1)
    price = 100 * (mean[:, 1] / mean[:, 2:].amin(1) - 1)  # against the specialist that is best at it
    helps, close = int((mean[:, 1] < mean[:, 0]).sum()), int((price <= 10).sum())
    size = sum(p.numel() for p in lab.models[MIXED][0].parameters())
    return said, picture, [
        f"Blind MSE against the best specialist: {', '.join(f'{p:+.0f}% on {name}' for p, name in zip(price, names))}.",
        f"A universal denoiser in {size:,} parameters? {'Yes' if helps == close == len(tests) else 'No'}: it improves "
        f"{helps} of {len(tests)} inputs, and on {close} it beats the best specialist or is within 10% of it."]


EXERCISES = {  # name: (function, the models it needs)
    "compare": (compare, [CLEAN, DAE]),
    "levels": (levels, LEVELS),
    "types": (lambda lab: matrix(lab, SPECIALISTS), SPECIALISTS),
    "features": (features, [CLEAN, DAE]),
    "progressive": (progressive, [DAE]),
    "blind": (blind, [MIXED, *SPECIALISTS]),
}


def progress_line(total):
    """A function to call after each of `total` equal steps. It prints how far we are, in a file every 15 seconds."""
    start = shown = time.time()
    done, terminal = 0, sys.stdout.isatty()

    def step(what):
        nonlocal done, shown
        done, now = done + 1, time.time()
        if done == total or now - shown > (0.2 if terminal else 15):
            shown, left = now, int((now - start) / done * (total - done))
            line = f"{done} of {total}: {what}, {left // 60}:{left % 60:02} left"
            print(f"\r{line:79}" if terminal else line, end="\n" if done == total or not terminal else "", flush=True)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exercise", choices=[*EXERCISES, "all"], help="without it: layers and parameters")
    parser.add_argument("--seeds", type=int, default=3, help="how many times each model is trained")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", default="auto", help="auto, mnist or glyphs")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are, or are put")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures of the exercises to FILE")
    parser.add_argument("--bench", action="store_true", help="time the parts of a training step")
    parser.add_argument("--batch-size", type=int, default=512, help="of training and of --bench")
    parser.error = fail
    args = parser.parse_args()
    for flag in ("seeds", "epochs", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.batch_size > 60_000:
        raise ValueError(f"--batch-size must be at most 60000, got {args.batch_size}")
    if args.data not in ("auto", "mnist", "glyphs"):
        raise ValueError(f"the autoencoders take 28 x 28 grey images: --data auto, mnist or glyphs, not {args.data}")

    if args.exercise:  # this and --bench need the files beside this one
        from data import image_grid, load_dataset
        from noise import NOISES, add_mixed_noise
        from sample import heat
        from schedule import line_chart

        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows = torch.arange(784, device=device) // 28
        noises = {"clean": lambda images, *_: images, **{name: add for name, (add, _) in NOISES.items()},
                  "mixed": lambda images, _, generator: add_mixed_noise(images, generator),
                  "stripes": lambda images, *_: torch.where(rows % 4 == 0, 1.0, images)}  # every fourth row white
        lab = SimpleNamespace(seeds=args.seeds, noises=noises, image_grid=image_grid, heat=heat, line_chart=line_chart)
        data, images, labels = load_dataset(args.data, args.data_dir, train=True, real="mnist")
        _, test_images, test_labels = load_dataset(data, args.data_dir, train=False)
        lab.images, lab.test_images = (x.to(device).flatten(1) / 255 for x in (images, test_images))
        lab.labels, lab.test_labels = (x.to(device).long() for x in (labels, test_labels))
        args.out.mkdir(parents=True, exist_ok=True)

        # Every model that is needed, trained once.
        chosen = list(EXERCISES) if args.exercise == "all" else [args.exercise]
        kinds = dict.fromkeys(kind for name in chosen for kind in EXERCISES[name][1])
        print(f"{data}: {len(images):,} training, {len(test_images):,} test images | {len(kinds)} models x {args.seeds}"
              f" seeds x {args.epochs} epochs | {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        start, progress, lab.models = time.time(), progress_line(len(kinds) * args.seeds * args.epochs), {}
        for kind in kinds:
            corrupt = lambda clean, generator: noises[kind[0]](clean, kind[1], generator)
            lab.models[kind] = [train_autoencoder(lab.images, corrupt, args.epochs, seed, batch_size=args.batch_size,
                                                  on_epoch=lambda: progress(f"training on {title(kind)}, seed {seed}"))
                                for seed in range(args.seeds)]
        print(f"trained in {time.time() - start:.0f} s")

        results = {}
        for name in chosen:
            print(f"\n{name}")
            figures, picture, sentences = EXERCISES[name][0](lab)
            path = args.out / f"autoencoder-{name}.png"
            picture.save(path)
            print(*sentences, f"picture: {path}", sep="\n")
            results[name] = dict(figures=figures, conclusions=sentences)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            settings = dict(data=data, seeds=args.seeds, epochs=args.epochs)
            args.json.write_text(json.dumps(settings | dict(exercises=results), indent=1) + "\n")
            print(f"figures: {args.json}")
        return

    model = DenoisingAutoencoder()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            print(f"{name:10}  {layer.in_features:4d} -> {layer.out_features:4d}  "
                  f"{sum(p.numel() for p in layer.parameters()):9,} parameters")
    print(f"{'in all':25}{sum(p.numel() for p in model.parameters()):9,} parameters")
    if args.bench:
        bench(model, args.batch_size)
    else:
        print("(nothing was written; --bench measures speed, --exercise opens the lab)")


def bench(model, batch):
    """Print what each part of a training step costs on the CPU, and its share of the matrix products' rate."""
    try:
        from nf_denoiser import flops, seconds
        from noise import add_gaussian_noise
    except ImportError:
        raise ValueError("--bench needs the files beside this one: run it in the repository") from None
    data, generator = torch.rand(60_000, 784), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    matrix, images = torch.rand(2048, 2048), data[:batch]

    def draw():
        clean = data.index_select(0, torch.randint(60_000, (batch,), generator=generator))
        return clean, add_gaussian_noise(clean, 0.3, generator)

    def both(clean=images, noisy=images):
        optimizer.zero_grad()
        F.mse_loss(model(noisy)[0], clean).backward()

    def forward():
        with torch.no_grad():
            F.mse_loss(model(images)[0], images)

    def step():
        both(*draw())
        optimizer.step()

    multiply = lambda: matrix @ matrix
    product, *times, whole, drawing, optimising = seconds([multiply, forward, both, step, draw, optimizer.step],
                                                          torch.device("cpu"), 8.0)
    rate = 2 * 2048**3 / product
    for name, work, each in (("forward", forward, times[0]), ("forward + backward", both, times[1])):
        print(f"{name:20}{1e3 * each:8.2f} ms {batch / each:10,.0f} images/s {flops(work) / each / rate:5.0%} of the matmul "
              f"rate ({rate / 1e9:.0f} GFLOP/s)")
    print(f"{'train_autoencoder step':23}{1e3 * whole:8.2f} ms {batch / whole:10,.0f} images/s; data and noise "
          f"{drawing / whole:.0%}, optimiser {optimising / whole:.0%} of it; batches of {batch}, "
          f"{torch.get_num_threads()} threads")


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
