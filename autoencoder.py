"""A denoising autoencoder: an MLP that recovers the clean image from a corrupted one.

    encode  z = f(y)          784 -> 256 -> 128 -> 64       y: the corrupted image
    decode  x_hat = g(z)       64 -> 128 -> 256 -> 784
    loss    mean (x_hat - x)^2                              x: the CLEAN image

If the target were y, copying the noise would pay off. With x as the target, the 64 numbers are
best spent on the structure that clean images share. A plain autoencoder is the same network
with y = x. After Vincent et al., "Extracting and Composing Robust Features with Denoising
Autoencoders" (ICML 2008).

There is no ReLU behind the latent layer: with one, 18 of the 64 latents were dead after 10 epochs
and the test MSE was 0.0102 instead of 0.0089 (Gaussian noise 0.3, two seeds).

    python autoencoder.py                      # layers and parameters
    python train.py --model dae                # train one; --model ae is its control
    python autoencoder.py --exercise compare   # the lab; also levels, types, blind, features,
                                               # progressive, or all

The class and train_autoencoder need only torch: copy them anywhere. The lab uses the files beside
this one.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class DenoisingAutoencoder(nn.Module):
    """input_dim-256-128-latent_dim-128-256-input_dim, ReLU between, sigmoid at the end.

    Images (B, ...) with input_dim values each in [0, 1]. Vincent et al. (2008), section 2.
    """

    def __init__(self, input_dim=784, latent_dim=64):
        super().__init__()
        self.input_dim = input_dim
        self.encoder = nn.Sequential(nn.Linear(input_dim, 256), nn.ReLU(),
                                     nn.Linear(256, 128), nn.ReLU(),
                                     nn.Linear(128, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 128), nn.ReLU(),
                                     nn.Linear(128, 256), nn.ReLU(),
                                     nn.Linear(256, input_dim), nn.Sigmoid())
        for layer in (*self.encoder, *self.decoder):
            if isinstance(layer, nn.Linear):  # He et al. (2015), eq. 10: keeps variances with ReLU
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        # smaller, so that the first output is close to the bias: Glorot & Bengio (2010), eq. 12
        nn.init.xavier_normal_(self.decoder[-2].weight)

    @torch.no_grad()
    def init_output_bias(self, images):
        """Make the untrained output the mean of images (N, ...) in [0, 1], the best constant.

        Raises RuntimeError for images of another size.
        """
        mean = images.flatten(1).mean(0).clamp(0.01, 0.99)
        self.decoder[-2].bias.copy_(mean.logit())

    def encode(self, x):
        """Images (B, ...) in [0, 1] -> latent (B, latent_dim). Raises ValueError for a size."""
        if x.flatten(1).shape[1] != self.input_dim:
            raise ValueError(f"the autoencoder takes {self.input_dim} values per image, got shape "
                             f"{tuple(x.shape)}")
        return self.encoder(x.flatten(1))

    def decode(self, latent):
        """latent (B, latent_dim) -> images (B, input_dim) in [0, 1]."""
        return self.decoder(latent)

    def forward(self, x):
        """Corrupted images (B, ...) -> (reconstruction like x, in [0, 1]; latent)."""
        latent = self.encode(x)
        return self.decode(latent).view_as(x), latent


def warmup_cosine(step, steps, warmup):
    """Learning rate as a share of its peak: linear over the first `warmup` of the steps (a share,
    0 to 1), times half a cosine that falls to 0. Loshchilov & Hutter (2017), eq. 5."""
    rise = min(1.0, (step + 1) / max(1, warmup * steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_autoencoder(model, optimizer, images, corrupt, steps, batch_size, lr, seed, first=0,
                      rows=slice(None)):
    """The training loop: yields (steps done, loss) after each step. Vincent et al. (2008), sec. 2.

    images: float (N, D) in [0, 1]. corrupt: (images, generator) -> corrupted images; called for
    each batch, so the noise is always new. lr: the peak. seed: of order and noise. first: the
    step to begin with. rows: those of the batch that this process takes.
    """
    per_epoch = max(1, len(images) // batch_size)
    for step in range(first, steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            shuffled = torch.randperm(len(images), generator=generator).to(images.device)
        generator = torch.Generator(images.device).manual_seed(seed * 1_000_003 + step)
        index = shuffled[place * batch_size:(place + 1) * batch_size]
        clean = images.index_select(0, index)  # twice as fast as images[index]
        noisy = corrupt(clean, generator)
        loss = F.mse_loss(model(noisy[rows])[0], clean[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * warmup_cosine(step, steps, 0.1)
        optimizer.step()
        yield step + 1, loss.detach()


def corruption(text):
    """A function (images, generator) -> corrupted images, from its description.

    text: "clean", "mixed", "stripes" (every fourth row white), a noise of noise.py with its
    strength, such as "gaussian 0.3", or several of these joined by " + ".
    """
    from noise import NOISES, add_mixed_noise

    def corrupt(images, generator=None):
        for part in text.split(" + "):
            name, *strength = part.split()
            if name == "mixed":
                images = add_mixed_noise(images, generator)
            elif name == "stripes":
                row = torch.arange(784, device=images.device) // 28
                images = torch.where(row % 4 == 0, 1.0, images.flatten(1)).view_as(images)
            elif name != "clean":
                images = NOISES[name][0](images, float(strength[0]), generator)
        return images

    return corrupt


# ------------------------------------------------------------------------- table and picture

CORRUPTIONS = ["clean", "gaussian 0.3", "salt_pepper 0.2", "masking 0.3"]


@torch.no_grad()
def test_error(model, images, corrupt, seed=0):
    """Mean squared error against the clean images uint8 (N, ...); the noise is that of `seed`."""
    clean = images.flatten(1).float() / 255
    generator = torch.Generator(clean.device).manual_seed(seed)
    return F.mse_loss(model(corrupt(clean, generator))[0], clean).item()


@torch.no_grad()
def report_autoencoder(model, images, folder, name, seed=0):
    """Print a table over CORRUPTIONS, draw folder/samples.png, return {corruption: figures}.

    images: uint8 (N, 1, 28, 28). Figures, all against the clean image: mse_before and mse, of the
    corrupted image and the reconstruction; psnr in dB.
    """
    from data import heat, image_grid
    clean, results, rows, labels = images.float() / 255, {}, [], []
    title = f"{name}, {len(images):,} images"
    print(f"{title:30}{'MSE before':>12}{'MSE':>12}{'PSNR dB':>12}")
    for text in CORRUPTIONS:
        generator = torch.Generator(clean.device).manual_seed(seed)
        noisy = corruption(text)(clean, generator)
        restored = model(noisy)[0]
        mse_before, mse = (F.mse_loss(x, clean).item() for x in (noisy, restored))
        psnr = -10 * math.log10(max(mse, 1e-12))
        results[text] = dict(mse_before=mse_before, mse=mse, psnr=psnr)
        print(f"{text:30}{mse_before:12.5f}{mse:12.5f}{psnr:12.2f}")
        error = [heat(e) for e in restored[:10] - clean[:10]]
        rows += [list(noisy[:10]), list(restored[:10]), error]
        labels += [text, "reconstructed", "error"]
    folder.mkdir(parents=True, exist_ok=True)
    image_grid(rows, row_labels=labels, zoom=2).save(folder / "samples.png")
    print(f"picture: {folder / 'samples.png'}")
    return results


# ----------------------------------------------------------------------------------- the lab

SPECIALISTS = CORRUPTIONS[1:]
LEVELS = [f"gaussian {level}" for level in (0.1, 0.2, 0.3, 0.4, 0.5)]
CROSS_TESTS = {  # exercise: (trained on, tested on)
    "compare": (CORRUPTIONS[:2], CORRUPTIONS),
    "levels": (LEVELS, LEVELS),
    "types": (SPECIALISTS, SPECIALISTS),
    "blind": (["mixed", *SPECIALISTS],
              [*SPECIALISTS, "masking 0.3 + gaussian 0.3", "gaussian 0.3 + salt_pepper 0.2",
               "stripes"]),
}
EXERCISES = CROSS_TESTS | {"features": (CORRUPTIONS[:2], None),
                           "progressive": (["gaussian 0.3"], None)}


def print_table(title, rows, columns, figures):
    """figures {(row, column): one number per seed}: mean and standard deviation, printed and
    returned as {row: {column: [mean, standard deviation]}}."""
    widths = [2 + max(len(column), 16) for column in columns]
    print(f"\n{title}\n{'':28}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths)))
    table = {}
    for row in rows:
        table[row] = {}
        for column in columns:
            x = torch.tensor(figures[row, column])
            table[row][column] = [x.mean().item(), x.std(correction=min(1, len(x) - 1)).item()]
        cells = (f"{mean:.4f} +- {std:.4f}" for mean, std in table[row].values())
        print(f"{row:28}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)))
    return table


def cross_test(models, test, trained_on, tested_on):
    """Every model on every corruption of the test images: does one skill transfer to another?

    models: {corruption: [a model for each seed]}. test: float (N, 784).
    Returns (figures for print_table, picture).
    """
    from data import image_grid
    figures, rows = {}, []
    for text in tested_on:
        noisy = corruption(text)(test, torch.Generator(test.device).manual_seed(0))
        figures["left alone", text] = [F.mse_loss(noisy, test).item()] * len(models[trained_on[0]])
        shown = [test[0], noisy[0]]
        for trained in trained_on:
            restored = [model(noisy)[0] for model in models[trained]]
            figures[f"trained on {trained}", text] = [F.mse_loss(x, test).item() for x in restored]
            shown.append(restored[0][0])
        rows.append([x.view(1, 28, 28) for x in shown])
    return figures, image_grid(rows, ["truth", "input", *trained_on], tested_on)


def linear_classifier(features, labels, classes=10):
    """Logistic regression with the penalty |W|^2 / 2N: a function features (N, D) -> labels (N,).

    features: float (N, D), labels: int64 (N,). All features share one scale, because dividing a
    pixel that is almost always black by its own deviation would amplify its noise.
    """
    shift, scale = features.mean(0), features.var(0).mean().sqrt() + 1e-8
    x = (features - shift) / scale
    layer = nn.Linear(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), labels) + layer.weight.square().sum() / (2 * len(x))
        value.backward()
        return value

    optimizer.step(loss)
    return lambda features: layer((features - shift) / scale).argmax(1)


def features(models, train, test, labels, test_labels):
    """Correlation of the latents, accuracy of a linear classifier on them, first-layer filters.

    train, test: float (N, 784), labels int64 (N,). Returns (rows, columns, figures, picture).
    """
    from data import image_grid
    noisy = corruption("gaussian 0.3")(test, torch.Generator(test.device).manual_seed(0))
    counts = sorted({min(count, len(train)) for count in (100, 1000, len(train))})
    encoders = {text: [model.encode for model in models[text]] for text in CORRUPTIONS[:2]}
    encoders["pixels"] = [lambda images: images] * len(encoders["clean"])
    figures = {}
    for row, each_seed in encoders.items():
        for seed, encode in enumerate(each_seed):
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            z, z_test, z_noisy = encode(train), encode(test), encode(noisy)
            r = torch.corrcoef(z_test.T).fill_diagonal_(math.nan).abs()
            figures.setdefault((row, "mean |correlation|"), []).append(r.nanmean().item())
            for count in counts:
                chosen = order[:count].to(z.device)
                with torch.enable_grad():
                    classify = linear_classifier(z[chosen].clone(), labels[chosen])
                for column, x in (("clean", z_test), ("noisy", z_noisy)):
                    accuracy = (classify(x) == test_labels).float().mean().item()
                    figures.setdefault((row, f"{count:,} labels, {column}"), []).append(accuracy)
    mosaics = []
    for text in CORRUPTIONS[:2]:  # the 64 most active of 256 units
        layer = models[text][0].encoder[0]
        active = layer(test).relu().std(0).argsort(descending=True)[:64]
        weight = layer.weight[active]
        weight = 0.5 + 0.5 * weight / weight.abs().amax(1, keepdim=True)
        tiles = F.pad(weight.view(8, 8, 28, 28), (0, 1, 0, 1), value=1)
        mosaics.append(tiles.transpose(1, 2).reshape(1, 8 * 29, 8 * 29))
    picture = image_grid([mosaics], [f"trained on {text}" for text in CORRUPTIONS[:2]], zoom=2)
    return list(encoders), list(dict.fromkeys(column for _, column in figures)), figures, picture


def progressive(models, test, passes=10):
    """Images under Gaussian 0.5 and masking 0.3 through the model again and again.

    models: those trained on "gaussian 0.3", one per seed. test: float (N, 784). The second column
    adds Gaussian noise 0.1 before each pass. Returns (rows, columns, figures, picture).
    """
    from data import image_grid
    first = corruption("gaussian 0.5 + masking 0.3")(
        test, torch.Generator(test.device).manual_seed(0))
    figures, rows, columns = {}, [], ["nothing added", "noise 0.1 added"]
    for column, text in zip(columns, ("clean", "gaussian 0.1")):
        for model in models:
            x, shown, generator = first, [test[0], first[0]], torch.Generator(test.device)
            figures.setdefault(("input", column), []).append(F.mse_loss(x, test).item())
            for i in range(1, passes + 1):
                x = model(corruption(text)(x, generator))[0]
                figures.setdefault((f"pass {i}", column), []).append(F.mse_loss(x, test).item())
                shown.append(x[0])
            if model is models[0]:
                rows.append([image.view(1, 28, 28) for image in shown])
    names = ["input", *(f"pass {i}" for i in range(1, passes + 1))]
    return names, columns, figures, image_grid(rows, ["truth", *names], columns, zoom=3)


def train_models(texts, images, seeds, epochs, batch_size=512, lr=6e-3):
    """Train one model for each corruption and seed, as train.py does: {corruption: [models]}.

    images: float (N, 784) in [0, 1]. Raises ValueError if a loss is not finite.
    """
    models, start, shown = {text: [] for text in texts}, time.time(), time.time()
    steps, total = epochs * max(1, len(images) // batch_size), seeds * len(texts)
    for done, (text, seed) in enumerate((text, seed) for text in texts for seed in range(seeds)):
        torch.manual_seed(seed)
        model = DenoisingAutoencoder(images.shape[1]).to(images.device)
        model.init_output_bias(images)
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
        for step, loss in train_autoencoder(model, optimizer, images, corruption(text), steps,
                                            batch_size, lr, seed):
            if time.time() - shown > (0.5 if sys.stdout.isatty() else 15):
                shown, share = time.time(), (done + step / steps) / total
                line = (f"{done + 1} of {total} models: {text}, seed {seed}, "
                        f"{(shown - start) * (1 - share) / share:.0f} s left")
                print(f"\r{line:79}" if sys.stdout.isatty() else line, flush=True,
                      end="" if sys.stdout.isatty() else "\n")
        if not math.isfinite(loss):
            raise ValueError(f"training on {text} diverged: the learning rate {lr} is too high")
        models[text].append(model.eval().requires_grad_(False))
    print(f"\n{total} models trained in {time.time() - start:.0f} s")
    return models


def lab(args):
    """Train what the exercises need, then print their tables and draw their pictures."""
    from data import load_dataset
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, images, labels = load_dataset(args.data, args.data_dir, train=True, real="mnist")
    _, test, test_labels = load_dataset(name, args.data_dir, train=False, real="mnist")
    if images[0].numel() != 784:
        raise ValueError(f"the lab takes 28 x 28 grey images: --data mnist or glyphs, not {name}")
    images, test = (x.to(device).flatten(1).float() / 255 for x in (images, test))
    labels, test_labels = labels.to(device).long(), test_labels.to(device).long()
    exercises = list(EXERCISES) if args.exercise == "all" else [args.exercise]
    args.out.mkdir(parents=True, exist_ok=True)
    needed = list(dict.fromkeys(text for e in exercises for text in EXERCISES[e][0]))
    models = train_models(needed, images, args.seeds, args.epochs, args.batch_size)
    results = dict(data=name, seeds=args.seeds, epochs=args.epochs)
    for exercise in exercises:
        with torch.no_grad():
            if exercise in CROSS_TESTS:
                trained_on, columns = EXERCISES[exercise]
                figures, picture = cross_test(models, test, trained_on, columns)
                rows = [*(f"trained on {text}" for text in trained_on), "left alone"]
            elif exercise == "features":
                rows, columns, figures, picture = features(models, images, test, labels,
                                                           test_labels)
            else:
                rows, columns, figures, picture = progressive(models["gaussian 0.3"], test)
        unit = "shares" if exercise == "features" else "test MSE"
        title = f"{exercise} ({unit}; mean and standard deviation over {args.seeds} seeds)"
        results[exercise] = print_table(title, rows, columns, figures)
        picture.save(args.out / f"autoencoder-{exercise}.png")
        print(f"picture: {args.out / f'autoencoder-{exercise}.png'}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"figures: {args.json}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exercise", choices=[*EXERCISES, "all"])
    parser.add_argument("--seeds", type=int, default=3, help="how often each model is trained")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--data", default="auto", help="auto, mnist, glyphs or a folder")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to FILE")
    args = parser.parse_args()
    if min(args.seeds, args.epochs, args.batch_size) < 1:
        parser.error("--seeds, --epochs and --batch-size must be at least 1")
    if args.exercise:
        lab(args)
        return
    model = DenoisingAutoencoder()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            print(f"{layer.in_features:4d} -> {layer.out_features:4d}  "
                  f"{sum(p.numel() for p in layer.parameters()):9,} parameters")
    print(f"in all        {sum(p.numel() for p in model.parameters()):9,} parameters\n"
          f"(nothing was written; train.py trains it, --exercise runs the lab)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
