"""A denoising autoencoder: an MLP that recovers the clean image from a corrupted one.

    encode  z = f(y)          784 -> 256 -> 128 -> 64       y: the corrupted image
    decode  x_hat = g(z)       64 -> 128 -> 256 -> 784
    loss    mean (x_hat - x)^2                              x: the CLEAN image

If the target were y, the network would learn to copy the noise. With x as the target, its 64
numbers must describe what clean images have in common. A plain autoencoder is the same network
with y = x. After Vincent et al., "Extracting and Composing Robust Features with Denoising
Autoencoders" (ICML 2008).

    python autoencoder.py                      # layers and parameters
    python train.py --model dae                # train one; --model ae is its control
    python autoencoder.py --exercise compare   # the lab: one of six exercises, or all

The class and training_loop need only torch. The lab uses the files beside this one.
"""
import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class DenoisingAutoencoder(nn.Module):
    """input_dim-256-128-latent_dim-128-256-input_dim, ReLU between, sigmoid at the end.

    Images (B, ...) with input_dim values each in [0, 1]. Vincent et al. (2008), section 2. There
    is no ReLU behind the latent layer: with one, 10 and 18 of the 64 latents (seeds 0 and 1) were 0
    for every test image after 10 epochs, and the MSE on Gaussian 0.3 was 0.0104 instead of 0.0090.
    """

    def __init__(self, input_dim=784, latent_dim=64):
        super().__init__()
        self.input_dim = input_dim
        self.encoder = nn.Sequential(
            nn.Linear(input_dim, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
            nn.Linear(128, latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(),
            nn.Linear(256, input_dim), nn.Sigmoid())
        # He et al. (2015), eq. 10: keeps variances with ReLU. With PyTorch's own initial weights
        # and no init_output_bias, the same training ends at 0.0147 instead of 0.0090.
        for layer in (*self.encoder, *self.decoder):
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        # smaller, so that the first output is close to the bias: Glorot & Bengio (2010), eq. 12
        nn.init.xavier_normal_(self.decoder[-2].weight)

    @torch.no_grad()
    def init_output_bias(self, images):
        """Make the untrained output the mean of images (N, ...) in [0, 1], the best constant."""
        mean = images.flatten(1).mean(0).clamp(0.01, 0.99)
        self.decoder[-2].bias.copy_(mean.logit())

    def encode(self, x):
        """Images (B, ...) in [0, 1] -> latent (B, latent_dim). Raises ValueError otherwise."""
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


# -------------------------------------------------------------------------------------- training
def training_loop(model, optimizers, batch_loss, images, steps, batch_size, seed, warmup, first=0):
    """The loop that trains every model: yields (steps done, loss) after each step from `first`.

    images: (N, ...), in a new order in each epoch. batch_loss: indices (batch_size,) of images ->
    loss; its random numbers are torch's own. They and the order are seeded with functions of seed,
    epoch and step, so that a run can be resumed at any step. The learning rate is the one that an
    optimizer was made with, times a linear warm-up over the share `warmup` (0 to 1) of the steps,
    times a half-cosine decay to 0: Loshchilov & Hutter (2017), eq. 5.
    """
    per_epoch = max(1, len(images) // batch_size)
    for step in range(first, steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=generator).to(images.device)
        torch.manual_seed(seed * 1_000_003 + step)
        loss = batch_loss(order[place * batch_size:(place + 1) * batch_size])
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rise = min(1.0, (step + 1) / max(1, warmup * steps))
        rate = rise * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
        yield step + 1, loss.detach()


def autoencoder_loss(model, clean, text, shard=slice(None)):
    """Mean squared error against the clean images after the corruption `text`, with new noise.

    clean: float (B, 784) in [0, 1]. shard: the rows of this process. Vincent et al. (2008), sec. 2.
    """
    noisy = corrupt(clean, text)
    return F.mse_loss(model(noisy[shard])[0], clean[shard])


def corrupt(images, text, generator=None):
    """images (N, ...) in [0, 1], corrupted as the text says.

    text: clean, mixed, stripes (every fourth row white), a noise of noise.py with its strength,
    such as gaussian 0.3, or several of these joined by " + ".
    """
    from noise import NOISES, add_mixed_noise
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


def corrupted(images, text):
    """corrupt(images, text) with the same noise in every call, for tests."""
    return corrupt(images, text, torch.Generator(images.device).manual_seed(0))


# ----------------------------------------------------------------------------------- the lab
# Each exercise takes models {corruption: [one for each seed]}, images float (N, 784) in [0, 1] and
# labels int64 (N,). It returns a table {row: {column: [number for each seed]}}, test MSE if the
# column does not say otherwise, and the arguments of image_grid.

CORRUPTIONS = ["clean", "gaussian 0.3", "salt_pepper 0.2", "masking 0.3"]


def cross_test(tested_on, models, test, *_, shown=1):
    """Every model on every corruption of the test images: does one skill transfer to another?

    The picture shows the first `shown` images under each corruption.
    """
    table = {row: {} for row in (*(f"trained on {text}" for text in models), "left alone")}
    rows, shown = [], min(shown, len(test))
    for text in tested_on:
        noisy = corrupted(test, text)
        first = []
        table["left alone"][text] = [F.mse_loss(noisy, test).item()]
        for trained_on, each_seed in models.items():
            restored = [model(noisy)[0] for model in each_seed]
            table[f"trained on {trained_on}"][text] = [F.mse_loss(x, test).item() for x in restored]
            first.append(restored[0])
        rows.append([x[i].view(1, 28, 28) for i in range(shown) for x in (test, noisy, *first)])
    return table, dict(rows=rows, row_labels=tested_on,
                       column_labels=["truth", "input", *models] * shown)


@torch.no_grad()
def report_autoencoder(model, images, folder, trained_on):
    """Print the table of cross_test for one model on images uint8 (N, 1, 28, 28), and return it;
    draw folder/samples.png. trained_on: the model's corruption."""
    from data import image_grid
    test = images.flatten(1).float() / 255
    table, grid = cross_test(CORRUPTIONS, {trained_on: [model]}, test, shown=4)
    folder.mkdir(parents=True, exist_ok=True)
    image_grid(**grid, zoom=3).save(folder / "samples.png")
    print(f"test MSE, {len(test):,} images\n{markdown(table)}picture: {folder / 'samples.png'}")
    return table


def linear_classifier(x, labels, classes=10):
    """Ridge regression to one-hot labels: a function x (N, D) -> labels (N,).

    x: float (N, D), labels: int64 (N,). Minimises mean |A w - one_hot|^2 + 0.1 |w|^2 with
    A = [x, 1], where each feature is centred, then all are divided by one common scale.
    """
    shift, scale = x.mean(0), x.var(0).mean().sqrt() + 1e-8
    add_one = lambda x: F.pad((x - shift) / scale, (0, 1), value=1)
    A = add_one(x)
    penalty = 0.1 * len(x) * torch.eye(A.shape[1], device=x.device)
    w = torch.linalg.solve(A.T @ A + penalty, A.T @ F.one_hot(labels, classes).to(x))
    return lambda x: (add_one(x) @ w).argmax(1)


def features(models, test, test_labels, train, labels):
    """Correlation of the latents, accuracy of a linear classifier on them, first-layer filters."""
    noisy = corrupted(test, "gaussian 0.3")
    table, rows = {}, []
    encoders = {f"trained on {text}": [model.encode for model in models[text]] for text in models}
    encoders["pixels"] = [nn.Identity()] * len(models["clean"])
    for row, each_seed in encoders.items():
        table[row] = columns = {}
        for seed, encode in enumerate(each_seed):
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            z, z_test, z_noisy = encode(train), encode(test), encode(noisy)
            r = torch.corrcoef(z_test.T).fill_diagonal_(math.nan).abs()
            columns.setdefault("mean absolute correlation", []).append(r.nanmean().item())
            for count in sorted({min(n, len(train)) for n in (100, 1000, len(train))}):
                chosen = order[:count].to(z.device)
                classify = linear_classifier(z[chosen], labels[chosen])
                for name, x in (("clean", z_test), ("noisy", z_noisy)):
                    accuracy = (classify(x) == test_labels).float().mean().item()
                    columns.setdefault(f"{count:,} labels, {name}", []).append(accuracy)
    for each_seed in models.values():  # the 16 most active of 256 units
        layer = each_seed[0].encoder[0]
        active = layer(test).relu().std(0).argsort(descending=True)[:16]
        weight = layer.weight[active]
        weight = 0.5 + 0.5 * weight / weight.abs().amax(1, keepdim=True)
        rows.append(list(weight.view(-1, 1, 28, 28)))
    return table, dict(rows=rows, row_labels=[f"trained on {text}" for text in models], zoom=3)


def progressive(models, test, *_, passes=10):
    """Gaussian 0.5 and masking 0.3: the output of a model is fed back into it, `passes` times."""
    noisy = corrupted(test, "gaussian 0.5 + masking 0.3")
    added = {"nothing added": "clean", "noise 0.1 added": "gaussian 0.1"}  # before each pass
    names = ["input", *(f"pass {i + 1}" for i in range(passes))]
    table, rows = {name: {column: [] for column in added} for name in names}, []
    for column, text in added.items():
        for seed, model in enumerate(models["gaussian 0.3"]):
            generator = torch.Generator(test.device).manual_seed(seed)
            x, shown = noisy, [test[0]]
            for name in names:
                if name != "input":
                    x = model(corrupt(x, text, generator))[0]
                table[name][column].append(F.mse_loss(x, test).item())
                shown.append(x[0])
            if seed == 0:
                rows.append([x.view(1, 28, 28) for x in shown])
    return table, dict(rows=rows, column_labels=["truth", *table], row_labels=list(added), zoom=3)


PAIR = ["clean", "gaussian 0.3"]  # the plain autoencoder and the denoiser
SPECIALISTS = CORRUPTIONS[1:]
LEVELS = [f"gaussian {level}" for level in (0.1, 0.2, 0.3, 0.4, 0.5)]
UNKNOWN = ["masking 0.3 + gaussian 0.3", "gaussian 0.3 + salt_pepper 0.2", "stripes"]
EXERCISES = {  # name: (what its models are trained on, function)
    "compare": (PAIR, partial(cross_test, CORRUPTIONS)),
    "levels": (LEVELS, partial(cross_test, LEVELS)),
    "types": (SPECIALISTS, partial(cross_test, SPECIALISTS)),
    "blind": (["mixed", *SPECIALISTS], partial(cross_test, SPECIALISTS + UNKNOWN)),
    "features": (PAIR, features),
    "progressive": (["gaussian 0.3"], progressive),
}


def train_models(texts, images, seeds, epochs, batch_size=512, lr=6e-3):
    """Train one model for each corruption and seed, as train.py does: {corruption: [models]}.

    images: float (N, 784) in [0, 1]. Raises ValueError if the last loss is not finite.
    """
    models = {text: [] for text in texts}
    steps = epochs * max(1, len(images) // batch_size)
    for text in texts:
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = DenoisingAutoencoder(images.shape[1]).to(images.device)
            model.init_output_bias(images)
            optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
            batch_loss = lambda index: autoencoder_loss(model, images.index_select(0, index), text)
            for _, loss in training_loop(model, [optimizer], batch_loss, images, steps, batch_size,
                                         seed, warmup=0.1):
                pass
            if not math.isfinite(loss):
                raise ValueError(f"training on {text} diverged: the learning rate {lr} is too high")
            models[text].append(model.eval().requires_grad_(False))
            print(f"trained on {text}, seed {seed}: loss {loss:.4f}", flush=True)
    return models


def markdown(table):
    """{row: {column: numbers}} as a markdown table: mean, and ± standard deviation if several."""
    lines = [["", *next(iter(table.values()))]]
    lines.append(["---"] * len(lines[0]))
    for row, columns in table.items():
        cells = [torch.tensor(numbers) for numbers in columns.values()]
        lines.append([row, *(f"{x.mean():.4f}" + (f" ± {x.std():.4f}" if len(x) > 1 else "")
                             for x in cells)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


def lab(args):
    """Train what the exercises need, print their tables, write them to lab.md, draw pictures."""
    from data import image_grid, load_dataset
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, images, labels = load_dataset(args.data, args.data_dir, train=True, real="mnist")
    _, test, test_labels = load_dataset(name, args.data_dir, train=False, real="mnist")
    if images[0].numel() != 784:
        raise ValueError(f"the lab takes 28 x 28 grey images: --data mnist or glyphs, not {name}")
    images, test = (x.to(device).flatten(1).float() / 255 for x in (images, test))
    labels, test_labels = labels.to(device).long(), test_labels.to(device).long()
    exercises = list(EXERCISES) if args.exercise == "all" else [args.exercise]
    args.out.mkdir(parents=True, exist_ok=True)
    texts = dict.fromkeys(text for exercise in exercises for text in EXERCISES[exercise][0])
    models = train_models(texts, images, args.seeds, args.epochs, args.batch_size)
    tables = {}
    report = (f"`python autoencoder.py --exercise {args.exercise} --data {name} --epochs "
              f"{args.epochs} --seeds {args.seeds}`: test MSE, unless a column says otherwise; "
              f"mean ± standard deviation over the seeds.\n")
    for exercise in exercises:
        trained_on, function = EXERCISES[exercise]
        tables[exercise], grid = function({text: models[text] for text in trained_on}, test,
                                          test_labels, images, labels)
        report += f"\n## {exercise}\n\n{markdown(tables[exercise])}"
        image_grid(**grid).save(args.out / f"autoencoder-{exercise}.png")
    (args.out / "lab.md").write_text(report, encoding="utf-8")
    print(f"{report}\nwritten to {args.out}: lab.md and a picture for each exercise")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(tables, indent=1) + "\n")
        print(f"figures: {args.json}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--exercise", choices=[*EXERCISES, "all"])
    add("--seeds", type=int, default=3, help="seeds for each model, default %(default)s")
    add("--epochs", type=int, default=10, help="default %(default)s")
    add("--batch-size", type=int, default=512)
    add("--data", default="auto", help="auto, mnist, glyphs or a folder")
    add("--data-dir", type=Path, default=Path("data"), help="folder of the data sets")
    add("--out", type=Path, default=Path("out"), help="folder for the tables and pictures")
    add("--json", type=Path, metavar="FILE", help="write the numbers of each seed as JSON")
    args = parser.parse_args()
    if min(args.seeds, args.epochs, args.batch_size) < 1:
        parser.error("--seeds, --epochs and --batch-size must be at least 1")
    if args.exercise:
        from data import run
        run(partial(lab, args))
    else:
        model = DenoisingAutoencoder()
        print(model, f"{sum(p.numel() for p in model.parameters()):,} parameters", sep="\n")


if __name__ == "__main__":
    main()
