"""A denoising autoencoder: an MLP that recovers the clean image from a noisy one.

    encode  latent = f(noisy)            784 -> 256 -> 128 -> 64
    decode  reconstructed = g(latent)     64 -> 128 -> 256 -> 784
    loss    mean (reconstructed - clean)^2

A plain autoencoder is the same network with noisy = clean. Vincent et al. (ICML 2008).

    python autoencoder.py                      # layers and parameters
    python train.py --model dae                # train one; --model ae is its control
    python autoencoder.py --exercise compare   # the lab: one of six exercises, or all

The lesson needs only torch: copy it anywhere. The lab uses data.py and noise.py, too.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class DenoisingAutoencoder(nn.Module):
    """input_dim-256-128-latent_dim-128-256-input_dim. In Vincent et al. (2008) one hidden layer.

    Each image has to pass through latent_dim numbers, far fewer than it has pixels. That is enough
    for clean images, whose pixels depend on each other, but not for independent noise.
    """

    def __init__(self, input_dim=784, latent_dim=64):
        super().__init__()
        self.input_dim = input_dim
        # No ReLU after the latent layer: where a ReLU outputs 0, its gradient is 0 too, so a latent
        # that is negative for every image would stay unused.
        self.encoder = nn.Sequential(
            nn.Linear(input_dim, 256), nn.ReLU(),
            nn.Linear(256, 128), nn.ReLU(),
            nn.Linear(128, latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 128), nn.ReLU(),
            nn.Linear(128, 256), nn.ReLU(),
            nn.Linear(256, input_dim), nn.Sigmoid())  # pixels are between 0 and 1
        # A ReLU sets half of its inputs to 0, which halves their mean square. Weights of variance
        # 2 / (number of inputs) make up for that: He et al. (2015), eq. 10.
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        # the last layer: smaller (Glorot & Bengio, 2010, eq. 12), to start closer to its bias
        nn.init.xavier_normal_(self.decoder[-2].weight)

    @torch.no_grad()
    def init_output_bias(self, images):
        """Bring the untrained output close to the mean of images (N, ...) in [0, 1], so that
        training starts with what is different about each image. ValueError for another size."""
        mean = images.flatten(1).mean(0).clamp(0.01, 0.99)
        if len(mean) != self.input_dim:
            raise ValueError(f"the autoencoder takes images of {self.input_dim} values, such as "
                             f"those of MNIST, not of {len(mean)}")
        self.decoder[-2].bias.copy_(mean.logit())  # the inverse of the sigmoid

    def encode(self, x):
        """Images (B, ...) in [0, 1] -> latent (B, latent_dim). RuntimeError for another size."""
        return self.encoder(x.flatten(1))

    def decode(self, latent):
        """latent (B, latent_dim) -> images (B, input_dim) in [0, 1]."""
        return self.decoder(latent)

    def forward(self, x):
        """Noisy images (B, ...) in [0, 1] -> (reconstructed, like x; latent (B, latent_dim))."""
        latent = self.encode(x)
        return self.decode(latent).view_as(x), latent


def autoencoder_loss(model, clean, noisy):
    """Mean squared error of the reconstructed images against the clean ones, (B, ...) in [0, 1].

    Vincent et al. (2008), section 2; there cross-entropy. Against the noisy image itself a network
    learns to copy its input. Against the clean one it has to remove the noise: its best answer is
    the mean of the clean images that fit the noisy one, each weighted by its probability.
    """
    reconstructed, _ = model(noisy)
    return F.mse_loss(reconstructed, clean)


def train_autoencoder(model, images, corrupt, epochs=10, batch_size=512, lr=6e-3, seed=0):
    """Train a DenoisingAutoencoder on images, float (N, ...) in [0, 1]; return it for evaluation.

    corrupt: a function images -> noisy images of the same shape, such as add_gaussian_noise; the
    identity trains a plain autoencoder. Each batch gets new noise, so there is none to memorise.
    The weights returned are frozen. Raises ValueError if the last loss is not finite.
    """
    model.train().requires_grad_(True).init_output_bias(images)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    batches = max(1, len(images) // batch_size)  # in an epoch; an incomplete last one is left out
    steps, step = epochs * batches, 0
    for epoch in range(epochs):
        torch.manual_seed(seed * 1_000_003 + epoch)  # as in train.py, which can resume
        order = torch.randperm(len(images)).to(images.device)
        for index in order.split(batch_size)[:batches]:
            torch.manual_seed(seed * 1_000_003 + step)
            clean = images[index]
            noisy = corrupt(clean)
            loss = autoencoder_loss(model, clean, noisy)
            optimizer.zero_grad()
            loss.backward()
            # The rate rises during the first tenth, until Adam's averages are reliable, then falls
            # to 0, so that random batches move the weights less: Loshchilov & Hutter (2017), eq. 5.
            rate = min(1.0, (step + 1) / (0.1 * steps))
            rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
            step += 1
    if not loss.isfinite():
        raise ValueError(f"training diverged: the learning rate {lr} is too high")
    print(f"{steps:,} steps, last loss {loss:.4f}")
    return model.eval().requires_grad_(False)


# ===================== below: the lab, its tables and pictures, command line
# A label says how images are corrupted: see corrupt. It is their name in tables and in pictures.
PAIR = ["clean", "gaussian 0.3"]  # the plain autoencoder and the denoiser
SPECIALISTS = ["gaussian 0.3", "salt_pepper 0.2", "masking 0.3"]
COMMON = ["clean", *SPECIALISTS]
LEVELS = ["gaussian 0.1", "gaussian 0.2", "gaussian 0.3", "gaussian 0.4", "gaussian 0.5"]
UNKNOWN = ["masking 0.3 + gaussian 0.3", "gaussian 0.3 + salt_pepper 0.2", "stripes"]
TRAINED_ON = {"compare": PAIR, "levels": LEVELS, "types": SPECIALISTS,
              "blind": ["mixed", *SPECIALISTS], "features": PAIR, "progressive": ["gaussian 0.3"]}
TESTED_ON = {"compare": COMMON, "levels": LEVELS, "types": SPECIALISTS,
             "blind": SPECIALISTS + UNKNOWN}


def corrupt(images, label, generator=None):
    """Noisy images of images (N, 1, 28, 28) in [0, 1], or, but for stripes, (N, 784).

    label: "clean", "mixed", "stripes", a noise and its strength, such as "gaussian 0.3", or several
    in turn, joined by " + ". Stripes: every fourth row is white, from the first on.
    """
    import noise
    for part in label.split(" + "):
        if part == "mixed":
            images = noise.add_mixed_noise(images, generator)
        elif part == "stripes":
            images = images.clone()
            images[..., ::4, :] = 1
        elif part != "clean":
            name, strength = part.split()
            add_noise, _ = noise.NOISES[name]
            images = add_noise(images, float(strength), generator)
    return images


def corrupt_test(images, label):
    """corrupt, with the same noise in every call."""
    return corrupt(images, label, torch.Generator(images.device).manual_seed(0))


def train_models(labels, images, seed, epochs, batch_size):
    """{label: a model trained on it}. images: float (N, 1, 28, 28) in [0, 1]."""
    models = {}
    for label in labels:
        print(f"trained on {label}, seed {seed}: ", end="", flush=True)
        torch.manual_seed(seed)
        model = DenoisingAutoencoder().to(images.device)
        models[label] = train_autoencoder(model, images, lambda x: corrupt(x, label), epochs,
                                          batch_size, seed=seed)
    return models


# -------------------------------------------------------------------------------- the exercises
# Each takes models {label: model}, all of one seed, and clean images `test` (N, 1, 28, 28). It
# returns a table {row: {column: figure}} and a picture. Test noise is the same in every call.

def cross_test(models, labels, test, count=1):
    """The MSE of every model on every corruption: does one skill transfer to another?

    The picture shows the first `count` images, and what each model makes of them.
    """
    from data import image_grid
    table, rows = {f"trained on {name}": {} for name in models}, []
    table["left alone"] = {}
    for label in labels:
        noisy = corrupt_test(test, label)
        outputs = [model(noisy)[0] for model in models.values()]
        for row, x in zip(table.values(), (*outputs, noisy)):
            row[label] = F.mse_loss(x, test).item()
        shown = [test, noisy, *outputs]
        rows.append([images[i] for i in range(count) for images in shown])
    return table, image_grid(rows, ["truth", "input", *models] * count, labels)


def linear_classifier(x, labels, *others):
    """The classes of other features by ridge regression to one-hot labels: a list of int64 (M,).

    x: float (N, D), labels: int64 (N,), others: (M, D). Minimises mean |A w - one_hot|^2 +
    0.1 |w|^2 with A = [x, 1], where each feature is centred, then all are divided by one scale.
    """
    mean = x.mean(0)
    scale = x.var(0).mean().sqrt() + 1e-8
    scaled = [(z - mean) / scale for z in (x, *others)]
    A, *others = [F.pad(z, (0, 1), value=1) for z in scaled]
    target = F.one_hot(labels).to(x)
    penalty = 0.1 * len(x) * torch.eye(A.shape[1], device=x.device)
    w = torch.linalg.solve(A.T @ A + penalty, A.T @ target)
    return [(z @ w).argmax(1) for z in others]


def mean_correlation(z):
    """Mean absolute correlation of two features of z (N, D): do they repeat each other?

    Constant features are left out; nan if no two features vary.
    """
    varies = z.std(0) > 1e-6  # more than rounding
    r = torch.corrcoef((z * varies).T).abs()  # nan for zeros
    return r.fill_diagonal_(math.nan).nanmean().item()


def features(models, test, test_labels, train, labels, seed):
    """The latents of each model as features, and the pixels: do linear classifiers that learn from
    few or many labels separate the digits? labels: int64 (N,), from 0 on; all 0: there are none.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    noisy = corrupt_test(test, "gaussian 0.3")
    encoders = {f"trained on {label}": model.encode for label, model in models.items()}
    encoders["pixels"] = nn.Flatten()
    table = {}
    for row, encode in encoders.items():
        z, z_test, z_noisy = encode(train), encode(test), encode(noisy)
        table[row] = {"mean absolute correlation": mean_correlation(z_test)}
        counts = (100, 1000, len(z)) if labels.any() else ()
        for count in counts:
            chosen = order[:count].to(z.device)
            classes = linear_classifier(z[chosen], labels[chosen], z_test, z_noisy)
            for name, found in zip(("clean", "noisy"), classes):
                correct = (found == test_labels).float().mean().item()
                table[row][f"{len(chosen):,} labels, {name}"] = correct
    return table, filters(models, test)


def filters(models, test):
    """A picture of the weights of 16 of 256 first units, whose outputs vary most; grey is 0."""
    from data import image_grid
    rows = []
    for model in models.values():
        layer = model.encoder[0]
        spread = layer(test.flatten(1)).relu().std(0)
        most_active = spread.topk(16).indices
        weight = layer.weight[most_active].view(-1, 1, 28, 28)
        rows.append([0.5 + 0.5 * image / image.abs().max() for image in weight])
    return image_grid(rows, row_labels=[f"trained on {label}" for label in models], zoom=3)


def progressive(model, test, seed, passes=10):
    """Very noisy images: the output is fed back into the model, as it is or with new noise."""
    from data import image_grid
    noisy = corrupt_test(test, "gaussian 0.5 + masking 0.3")
    names = ["input", *(f"pass {i + 1}" for i in range(passes))]
    columns = {"nothing added": "clean", "noise 0.1 added": "gaussian 0.1"}
    table, rows = {name: {} for name in names}, []
    for column, label in columns.items():
        generator = torch.Generator(test.device).manual_seed(seed)
        outputs = [noisy]
        for _ in range(passes):
            x = corrupt(outputs[-1], label, generator)
            outputs.append(model(x)[0])
        for row, x in zip(table.values(), outputs):
            row[column] = F.mse_loss(x, test).item()
        rows.append([x[0] for x in (test, *outputs)])
    return table, image_grid(rows, ["truth", *names], list(columns), zoom=3)


# ------------------------------------------------------------------------------------ the report
def markdown(tables):
    """One table of those of all seeds: means, and ± standard deviations where seeds differ."""
    columns = list(next(iter(tables[0].values())))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for row in tables[0]:
        lines.append([row])
        for column in columns:
            figures = torch.tensor([table[row][column] for table in tables])
            deviation = f" ± {figures.std():.4f}" if figures.min() < figures.max() else ""
            lines[-1].append(f"{figures.mean():.4f}{deviation}")
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


@torch.no_grad()
def report_autoencoder(model, images, folder, trained_on):
    """Print one model's table on images uint8 (N, 1, 28, 28), draw folder/samples.png.

    trained_on: the label of the model. Returns the table, {row: {corruption: MSE}}.
    """
    from data import save_pictures
    test = images / 255
    table, picture = cross_test({trained_on: model}, COMMON, test, count=min(4, len(test)))
    save_pictures(folder, {"samples.png": picture})
    print(f"test MSE, {len(test):,} images\n{markdown([table])}", end="")
    return table


def lab(args):
    """Train what the exercises need; after each seed write lab.md and the pictures."""
    from data import check_place, load_dataset, save_pictures, write_whole
    check_place(args.out / "lab.md")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, train, labels = load_dataset(args.data, args.data_dir, train=True, real="mnist")
    _, test, test_labels = load_dataset(data, args.data_dir, train=False, real="mnist")
    train, test = train.to(device) / 255, test.to(device) / 255
    labels, test_labels = labels.to(device).long(), test_labels.to(device)
    exercises = list(TRAINED_ON) if args.exercise == "all" else [args.exercise]
    if "features" in exercises and not labels.any():
        print(f"notice: {data} has no subfolders, so no labels: features are not classified")
    trained_on = dict.fromkeys(label for name in exercises for label in TRAINED_ON[name])
    tables = {name: [] for name in exercises}
    for seed in range(args.seeds):
        trained = train_models(trained_on, train, seed, args.epochs, args.batch_size)
        report = (f"`python autoencoder.py --exercise {args.exercise} --data {data} --epochs "
                  f"{args.epochs} --seeds {seed + 1}`: test MSE, unless a column says otherwise; "
                  f"mean ± standard deviation over the seeds; nan: no two features vary.\n")
        for name in exercises:
            models = {label: trained[label] for label in TRAINED_ON[name]}
            if name == "features":
                table, picture = features(models, test, test_labels, train, labels, seed)
            elif name == "progressive":
                table, picture = progressive(models["gaussian 0.3"], test, seed)
            else:
                table, picture = cross_test(models, TESTED_ON[name], test)
            tables[name].append(table)
            report += f"\n## {name}\n\n{markdown(tables[name])}"
            if seed == 0:
                save_pictures(args.out, {f"autoencoder-{name}.png": picture})
        write_whole(args.out / "lab.md", report.encode(errors="replace"))
        print(f"tables: {args.out}/lab.md, seeds {seed + 1} of {args.seeds}")
    print(report)


def main():
    from data import between, make_parser
    parser = make_parser(__doc__, default_data="auto")
    add, count = parser.add_argument, between(1, 10**7)
    add("--exercise", choices=[*TRAINED_ON, "all"])
    add("--seeds", type=count, default=3, help="seeds for each model, default %(default)s")
    add("--epochs", type=count, default=10, help="default %(default)s")
    add("--batch-size", type=count, default=512)
    args = parser.parse_args()
    if args.exercise:
        lab(args)
    else:
        model = DenoisingAutoencoder()
        print(model, f"{sum(p.numel() for p in model.parameters()):,} parameters", sep="\n")


if __name__ == "__main__":
    from data import run
    run(main)
