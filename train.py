"""Train the neural field (nf), the denoising autoencoder (dae), or its control without noise (ae).

    python train.py --model nf                    # 12 to 17 minutes, 2 cores; a GPU: 20,000 steps
    python train.py --model nf --parts perceiver  # attention alone, or another choice of parts
    python train.py --model nf --pixels anywhere  # the input lies anywhere, not on the pixel grid
    python train.py --model dae --noise salt_pepper --noise-param 0.4
    python train.py --model nf --data my_photos   # a folder of your own pictures
    python train.py --model nf --resume           # continue an interrupted run
    torchrun --standalone --nproc_per_node=2 train.py --model nf   # processes share every batch

All three compare a prediction with the CLEAN image: see nf_loss, autoencoder_loss. A resumed run
repeats an uninterrupted one, on a CPU bit for bit. Below out/MODEL it writes checkpoint.pt,
loss.png, samples.png and results.json; an older checkpoint.pt becomes checkpoint-old.pt.
"""
import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import sample  # before torch: it lets the CPU do what a Mac's GPU cannot
import torch
from PIL import Image

from autoencoder import (DenoisingAutoencoder, autoencoder_loss, corrupt, corrupt_test,
                         report_autoencoder)
from data import (BUILT_IN, between, check_place, line_chart, load_dataset, make_parser,
                  off_grid_split, run, save_pictures, sparse_split)
from nf_denoiser import PARTS, SIZES, NFDenoiser, nf_loss, pixel_covariance
from noise import NOISES
from schedule import DiffusionSchedule

RANK = int(os.environ.get("RANK", 0))  # torchrun: which process this is
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # of how many


def field_loss(model, schedule, images, index, args):
    """The loss, a scalar, of a batch: the images `index` of images uint8 (N, C, H, W).

    Half of the batch trains the one-step mean, half the steps of a sampler."""
    rows = slice(RANK, None, WORLD)  # this process's share of each half; all rows if it is alone
    make_split = off_grid_split if args.pixels == "anywhere" else sparse_split
    # A U-Net computes all pixels anyway, so the mean may be asked for all that are missing (None);
    # attention takes longer the more are asked.
    many = 0.6 if "perceiver" in args.parts else None
    mean_ratio = many if "unet" in args.parts else 0.2
    mean_half, sampling_half = index.chunk(2)
    losses = []
    for half, ratio, pure_noise in ((mean_half, mean_ratio, True), (sampling_half, 0.2, False)):
        split = make_split(images[half], output_ratio=ratio)
        losses.append(nf_loss(model, schedule, split, pure_noise, rows))
    return sum(losses) / 2


class Muon(torch.optim.Optimizer):
    """SGD with momentum, its matrices orthogonalised. Jordan et al. (2024), kellerjordan.github.io.

    A gradient is U S V^T (its SVD). A few of its singular values S are large, so a step along it
    changes little in the other directions. U V^T has the same directions, all with value 1. As
    (X X^T) X = U S^3 V^T, odd polynomials of X act on S alone: five times s -> 3.4445 s - 4.7750
    s^3 + 2.0315 s^5 brings any s from 0.01 to 1 to between 0.68 and 1.13.
    For matrices and kernels (out, in * height * width); AdamW trains the rest (make_optimizers)."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(p.grad)
                update = (p.grad + group["momentum"] * momentum).flatten(1)  # Nesterov's momentum
                x = update / (update.norm() + 1e-7)  # no singular value above 1
                for _ in range(5):
                    square = x @ x.T                                       # (out, out)
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.view_as(p), alpha=-group["lr"] * scale)


def training_loop(task, optimizers, images, args, first=0):
    """Train: yields (steps done, loss) after each step from `first`.

    task: from nf_task. task.batch_loss(index) is field_loss, task.warmup a share of the steps. The
    order is seeded by epoch, the rest by step, so that a run can be resumed at any step."""
    size, model = args.batch_size, task.model
    per_epoch = len(images) // size
    for step in range(first, args.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=generator).to(images.device)
        torch.manual_seed(args.seed * 1_000_003 + step)
        loss = task.batch_loss(order[place * size:(place + 1) * size])
        model.zero_grad()
        loss.backward()
        loss = loss.detach()
        if WORLD > 1:  # the mean over equal shares of a batch is that of the batch
            for x in [loss] + [p.grad for p in model.parameters()]:
                torch.distributed.all_reduce(x)
                x /= WORLD
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # A linear warm-up, times a half-cosine decay to 0. Loshchilov & Hutter (2017), eq. 5
        rate = min(1.0, (step + 1) / max(1, task.warmup * args.steps))
        rate *= 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for optimizer in optimizers:  # each has one group of parameters
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
        yield step + 1, loss


# ======================= below: models, optimizers, the run with its checkpoints, command line
def nf_task(args, images, test_images):
    """The field's model, losses and figures. images, test_images: uint8 (N, C, H, W)."""
    channels, side = images.shape[1:3]
    schedule = DiffusionSchedule(beta_schedule=args.beta_schedule)
    config = dict(SIZES[args.size], parts=args.parts, channels=channels, side=side)
    if args.num_latents:
        config["num_latents"] = args.num_latents
    model = NFDenoiser(schedule.alphas_cumprod, covariance=pixel_covariance(images), **config)
    model, schedule = model.to(args.device), schedule.to(args.device)
    fast = torch.cuda.is_bf16_supported(including_emulation=False)  # a GPU that has it in hardware

    def batch_loss(index):
        with torch.autocast("cuda", torch.bfloat16, enabled=fast):
            return field_loss(model.train(), schedule, images, index, args)

    def measure():
        """One-step PSNR of the model and of kriging on a few test images."""
        test = test_images[:100]
        figures = sample.evaluate_field(model.eval(), schedule, test, pixels=args.pixels)
        return [figures[method]["psnr"] for method in ("one-step mean", "kriging")]

    def report(folder):
        test = test_images[:args.evaluate or 200]
        return sample.report_field(model.eval(), schedule, test, folder, args.data,
                                   pixels=args.pixels)

    return SimpleNamespace(model=model, config=config, batch_loss=batch_loss, measure=measure,
                           report=report, metric="one-step PSNR", warmup=0.02,
                           every=min(500, max(1, args.steps // 8)))


def autoencoder_task(args, images, test_images):
    """The autoencoders, as nf_task."""
    config = dict(input_dim=784, latent_dim=64)
    model = DenoisingAutoencoder(**config)
    model.init_output_bias(images / 255)
    model = model.to(args.device)

    def batch_loss(index):
        clean = images[index].flatten(1) / 255
        noisy = corrupt(clean, args.noise)  # of all processes: two draw the same noise as one
        return autoencoder_loss(model, clean[RANK::WORLD], noisy[RANK::WORLD])

    @torch.no_grad()
    def measure():
        test = test_images[:1000].flatten(1) / 255
        noisy = corrupt_test(test, args.noise)
        return [autoencoder_loss(model, test, noisy).item()]

    def report(folder):
        return report_autoencoder(model, test_images[:args.evaluate], folder, args.noise)

    return SimpleNamespace(model=model, config=config, batch_loss=batch_loss, measure=measure,
                           report=report, metric="test MSE", warmup=0.1,
                           every=len(images) // args.batch_size)


def make_optimizers(model, args):
    """AdamW; for small and medium fields Muon for the matrices and kernels, AdamW for the rest.

    Muon's steps have a fixed size, AdamW's shrink with noisy gradients, so their learning rates are
    not comparable: 0.15 of --lr was the best ratio of a few. Latents, the first convolution and the
    output layers stay with AdamW. Without weights there are no optimizers.
    """
    muon = args.model == "nf" and args.size != "full"
    others = ("latents", "to_values.weight", "unet.first.weight")
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = muon and p.dim() > 1 and not name.endswith(others)
        (matrices if is_matrix else rest).append(p)
    optimizers = [Muon(matrices, args.lr)] if matrices else []
    if rest:
        lr = 0.15 * args.lr if muon else args.lr
        decay = 0.01 if args.model == "nf" else 0.0
        optimizers.append(torch.optim.AdamW(rest, lr, weight_decay=decay, fused=True))
    return optimizers


def train(task, optimizers, images, args, path, signals):
    """Run the loop; test, save and print now and then. Returns (losses, tests).

    signals: of noted_signals. They end it after a whole step, saved, in all processes. Raises
    ValueError, and saves nothing, if the loss, a weight or the test figure is not finite.
    """
    losses = torch.zeros(args.steps, device=args.device)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    first, tests, set_aside, stop = 0, [], None, 0
    if args.resume:
        first, tests = resume(path, settings, task.model, optimizers, losses)
    elif path.exists():
        set_aside = path.with_name("checkpoint-old.pt")
        print(f"notice: {path} will become {set_aside}; --resume would go on from it")

    def save(step):
        nonlocal set_aside
        sample.save_checkpoint(path, dict(
            kind=args.model, config=task.config, data=args.data, step=step, settings=settings,
            schedule=dict(beta_schedule=args.beta_schedule), model=task.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            losses=losses[:step].cpu(), tests=tests), set_aside)
        set_aside = None

    start = time.perf_counter()
    for step, loss in training_loop(task, optimizers, images, args, first):
        losses[step - 1] = loss
        stop = torch.tensor(max(signals, default=0))
        if WORLD > 1:
            torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
        rate = (step - first) / (time.perf_counter() - start)
        line = (f"step {step:,} of {args.steps:,}  {rate * args.batch_size:,.0f} images/s  "
                f"{(args.steps - step) / rate:.0f} s left")
        reporting = step % task.every == 0 or step == args.steps
        if reporting:
            tests.append([step, *task.measure()])
            line += f"  {task.metric} {tests[-1][1]:.4g}"
        if reporting or (stop and not set_aside):
            recent = losses[:step][-100:].mean()  # reading it makes a GPU wait
            numbers = [recent, torch.tensor(tests[-1:]), *task.model.parameters()]
            if not all(x.isfinite().all() for x in numbers):
                raise ValueError(f"the loss, a weight or the test figure is no longer finite at "
                                 f"step {step:,}, which is not saved: use a lower --lr")
            if RANK == 0:
                save(step)
            print(f"{line}  loss {recent:.5f}", flush=True)
        elif sys.stdout.isatty():
            print(line, end="\x1b[K\r")  # clears the rest of the line
        if stop:
            break
    if stop or signals:
        saved = f"saved: {path}. To go on, give the same command with --resume"
        print("stopped and", f"not saved: {path} is another run's" if set_aside else saved)
        sys.exit(128 + int(stop or signals[0]))
    if not optimizers and RANK == 0:
        save(0)
    print(f"trained in {time.perf_counter() - start:.0f} s; checkpoint: {path}")
    return losses, tests


@contextlib.contextmanager
def noted_signals():
    """A list that gets the number of the first Ctrl-C or SIGTERM; the next one ends the program."""
    def note(number, frame):
        if signals:
            sys.exit(128 + number)
        signals.append(number)

    signals = []
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # only the main thread may set signals
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, note))
        yield signals


def resume(path, settings, model, optimizers, losses):
    """Load a checkpoint into model, optimizers and losses; returns (its step, its tests)."""
    _, checkpoint = sample.load_checkpoint(path)
    if "optimizers" not in checkpoint:
        raise ValueError(f"{path} was exported for sampling and cannot be resumed")
    old, step = checkpoint["settings"], checkpoint["step"]
    changed = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items()
               if old.get(key) != value]
    if changed:
        raise ValueError(f"{path} was trained on {checkpoint['data']} and with other settings "
                         f"({', '.join(changed)}): use those, or another --out")
    if step > len(losses):
        raise ValueError(f"{path} has done {step:,} steps: --steps must be as many or more")
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(state)
    losses[:step] = checkpoint["losses"]
    return step, checkpoint["tests"]


def report(task, losses, tests, args, path):
    """Draw loss.png, the training loss and the test metric during training; the task's report."""
    try:
        if tests:
            width = max(1, len(losses) // 100)  # a point is the mean of a hundredth of the run
            means = losses.unfold(0, width, width).mean(dim=1).tolist()
            smooth = range(width, len(losses) + 1, width), means
            steps, *columns = zip(*tests)
            curves = zip([task.metric, "kriging"], [(steps, column) for column in columns])
            title = f"{args.model} on {Path(args.data).name}"
            picture = Image.new("RGB", (920, 320))
            picture.paste(line_chart(title, {"training loss": smooth}))
            picture.paste(line_chart(f"{task.metric} on test images", dict(curves)), (460, 0))
            save_pictures(path.parent, {"loss.png": picture})
        figures = task.report(path.parent)
        sample.write_json(path.with_name("results.json"), path, args.data, figures)
    except BaseException:  # an error, Ctrl-C or SIGTERM
        print(f"{path} is complete: the same command with --resume goes on to the pictures")
        raise


RECIPES = {  # --batch-size, --lr (Muon's; AdamW gets 0.15 of it), --steps, --epochs
    "small": (32, 0.02, 1250, None),
    "medium": (32, 0.02, 7000, None),
    "full": (64, 1e-4, None, 100),  # AdamW alone, like the autoencoders
    "ae": (512, 6e-3, None, 10),
}
ONLY_FOR = dict(size="nf", parts="nf", num_latents="nf", pixels="nf", beta_schedule="nf",
                noise="dae", noise_param="dae")
# the flags that a resumed run may change; noise_param is part of noise, data compared as images
FREE = {"steps", "epochs", "device", "resume", "evaluate", "out", "data", "data_dir",
        "noise_param"}


def parse_arguments(argv):
    parser = make_parser(__doc__, default_data="auto")
    add, count = parser.add_argument, between(1, 10**7)
    add("--model", choices=["nf", "dae", "ae"], default="nf")
    add("--size", choices=SIZES, default="small", help="nf only; default %(default)s")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="nf only")
    add("--num-latents", type=count, help="nf only: so many latents without a place, as in the "
        "paper, instead of one at each input pixel")
    add("--pixels", choices=["grid", "anywhere"], default="grid",
        help="nf only: where the input lies, on the pixel grid or anywhere")
    add("--beta-schedule", choices=["cosine", "linear"], default="cosine", help="nf only")
    add("--noise", choices=[*NOISES, "mixed"], default="gaussian", help="dae only")
    add("--noise-param", type=float, help="dae only (default 0.3, salt_pepper 0.2)")
    length = parser.add_mutually_exclusive_group().add_argument
    length("--steps", type=count, help="how many batches to train on")
    length("--epochs", type=count, help="or how many times through the data")
    add("--batch-size", type=count)
    add("--lr", type=between(1e-12, 1e30, float), help="peak learning rate")
    add("--seed", type=between(0, 2**31 - 1), default=42)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="continue from the checkpoint below --out")
    add("--evaluate", type=count, help="test images in the closing table (nf: 200, others: all)")
    args = parser.parse_args(argv)
    for flag, model in ONLY_FOR.items():
        if args.model != model and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} is for --model {model}")
    if args.num_latents and "perceiver" not in args.parts:
        parser.error("--num-latents is for the perceiver, which is not among --parts")
    if args.noise == "mixed" and args.noise_param is not None:
        parser.error("--noise-param is for a noise other than mixed")
    args.parts = [part for part in PARTS if part in args.parts]
    return args


def apply_recipe(args):
    """Fill in what the flags left open: batch size, learning rate, length, the noise's strength."""
    batch_size, lr, steps, epochs = RECIPES[args.size if args.model == "nf" else "ae"]
    args.batch_size = args.batch_size or batch_size
    args.lr = args.lr or lr
    if not args.steps and not args.epochs:
        args.steps, args.epochs = steps, epochs
        if steps and args.device.type == "cuda":
            args.steps = 20_000
    if args.model != "dae":
        args.noise = "clean"
    elif args.noise != "mixed":
        _, default = NOISES[args.noise]
        args.noise += f" {default if args.noise_param is None else args.noise_param}"


def start_processes(args):
    """Join the processes that torchrun started. Only the first one prints."""
    multiple = WORLD * (2 if args.model == "nf" else 1)  # each half of a batch is shared
    if args.batch_size % multiple:
        raise ValueError(f"--batch-size must be a multiple of {multiple}, got {args.batch_size}")
    if WORLD > 1:
        cuda = args.device.type == "cuda"  # nccl takes tensors on a GPU, gloo those on the CPU
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


def load_images(args):
    """Training and test images, uint8 (N, C, H, W). Sets args.data to the set that was loaded.

    The first process sends them to all others. A resumed run compares their checksums: a folder
    may have been moved, or have got new pictures.
    """
    loaded = [None, None, None]
    if RANK == 0:
        real = "cifar10" if args.model == "nf" else "mnist"
        name, images, _ = load_dataset(args.data, args.data_dir, train=True, real=real)
        _, test_images, _ = load_dataset(name, args.data_dir, train=False, real=real)
        if name not in ("cifar10", "mnist", *BUILT_IN):
            name = str(Path(name).resolve())  # found again from any directory
        loaded = [name, images, test_images]
    if WORLD > 1:
        torch.distributed.broadcast_object_list(loaded)
    args.data, images, test_images = loaded
    args.images, args.test_images = sample.checksum(images), sample.checksum(test_images)
    return images.to(args.device), test_images.to(args.device)


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_flush_denormal(True)  # weights of far pixels are below 1e-38, and CPUs slow at that
    if args.device == "cuda" and torch.cuda.is_available():  # torchrun: a GPU for each process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    args.device = sample.pick_device(args.device)
    apply_recipe(args)
    start_processes(args)
    path = args.out / args.model / "checkpoint.pt"
    if RANK == 0:
        for name in ("checkpoint.pt", "checkpoint-old.pt", "loss.png", "samples.png",
                     "results.json"):
            check_place(path.with_name(name))
    images, test_images = load_images(args)
    if args.steps is None:
        args.steps = args.epochs * (len(images) // args.batch_size)

    torch.manual_seed(args.seed)
    make_task = nf_task if args.model == "nf" else autoencoder_task
    task = make_task(args, images, test_images)
    optimizers = make_optimizers(task.model, args)
    if not optimizers:
        args.steps = 0  # --parts gaussian is linear algebra: it has no weights
    elif args.batch_size > len(images):
        raise ValueError(f"--batch-size {args.batch_size} is more than {len(images):,} images")
    print(f"{args.model}: {sum(p.numel() for p in task.model.parameters()):,} parameters | "
          f"{args.data}: {len(images):,} images | {args.device}, processes: {WORLD}, threads: "
          f"{torch.get_num_threads()}, torch {torch.__version__}\n"
          f"batches of {args.batch_size}, {args.steps:,} steps, learning rate {args.lr:g}")

    with noted_signals() as signals:
        losses, tests = train(task, optimizers, images, args, path, signals)
        if WORLD > 1:
            torch.distributed.destroy_process_group()
        if RANK == 0:
            signals.append(0)  # one more ends the program at once
            report(task, losses, tests, args, path)


if __name__ == "__main__":
    run(main)
