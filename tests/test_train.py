"""train.py: its loop against a loop written from the paper, the effect of every flag, draws, wrong command lines."""

import copy
import csv
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import latents_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import train
from avdit import PRESETS, AVDiT, Block, Layout, NoiseSchedule, predict, sample_timesteps, training_loss

ROOT = Path(__file__).parents[1]
TOY = Layout(PRESETS["toy"].modalities)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A network that trains in milliseconds."""
    monkeypatch.setitem(PRESETS, "toy", replace(PRESETS["toy"], dim=32, depth=1, heads=2))


def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def equal(a, b):
    """Whether nested dicts and lists are the same, tensors bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def parsed(monkeypatch, *arguments):
    """The settings that these arguments give."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.make_parser().parse_args()


# --- The recipe of App. B ---------------------------------------------------------------------------------------------


def test_the_papers_recipe_is_app_b(monkeypatch):
    args = parsed(monkeypatch, "--preset", "paper")
    assert (args.batch, args.steps, args.optimizer, args.lr, args.warmup) == (256, 400_000, "adamw", 5e-4, 5000)
    assert (args.mixture, args.prediction, NoiseSchedule().T) == ("monl", "eps", 1000)
    rates = [train.learning_rate(args, step) for step in (0, 2499, 4999, 200_000, 399_999)]
    assert rates[0] == pytest.approx(1e-7) and rates[1] == pytest.approx(2.5e-4, rel=1e-3)
    assert rates[2] == pytest.approx(5e-4, rel=1e-3) and rates[3] == pytest.approx(2.5e-4) and rates[4] < 1e-12


def test_a_short_run_warms_up_for_a_tenth_of_its_steps(monkeypatch):
    args = parsed(monkeypatch, "--preset", "paper", "--steps", 1000)
    steps, warm = (0, 49, 99, 100, 500), (0.01, 0.5, 1, 1, 1)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 1000)) for step in steps]
    rates = [train.learning_rate(args, step) for step in steps]
    assert rates == pytest.approx([5e-4 * x * y for x, y in zip(warm, cosine)])
    args.warmup = 50
    assert train.learning_rate(args, 48) == pytest.approx(5e-4 * 0.98 * 0.5 * (1 + math.cos(math.pi * 0.048)))
    assert train.learning_rate(args, 49) == pytest.approx(5e-4 * 0.5 * (1 + math.cos(math.pi * 0.049)))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_entry_of_a_recipe_is_a_flag(monkeypatch, preset):
    recipe = train.RECIPES[preset]
    args = vars(parsed(monkeypatch, "--preset", preset))
    assert {name: args[name] for name in recipe} == recipe and args["prediction"] == PRESETS[preset].prediction
    other = {name: {"optimizer": "adamw", "lr": 0.25, "ema": 0.125}.get(name, 7) for name in recipe}
    flags = [word for name, value in other.items() for word in ("--" + name, value)]
    args = vars(parsed(monkeypatch, "--preset", preset, *flags))
    assert {name: args[name] for name in recipe} == other


def test_the_data_choose_the_preset_and_the_format(monkeypatch):
    """And the preset chooses everything that is not said."""
    cases = [
        ((), "toy", data.TOY),
        (("--data", "folder"), "clips", (8, 64, 16000)),
        (("--data", "x.npz"), "clips", data.TOY),
        (("--data", "folder", "--preset", "toy"), "toy", (8, 64, 16000)),
        (("--data", "toy", "--preset", "paper"), "paper", data.TOY),
    ]
    for arguments, preset, media in cases:
        args = parsed(monkeypatch, "--lr", "1", *arguments)
        recipe = train.RECIPES[preset]
        assert (args.preset, args.batch, args.steps) == (preset, recipe["batch"], recipe["steps"]) and args.lr == 1
        assert (args.fps, args.size, args.sample_rate) == media
        assert (args.device, args.dtype, args.compile, args.accumulate) == ("auto", "auto", False, 1)
        assert (args.mixture, args.save_every, args.seed, args.out) == ("monl", 100, 0, "runs/toy")


# --- The loop ---------------------------------------------------------------------------------------------------------


SCALES = 0.2, 8  # of the loss, in turn, so that the norms of some gradients are above 1 and others below


def reference(args, z, layout):
    """Alg. 2 [App. B] written out, with clipping, AdamW, average and log -> {step: (weights, averages, log line)}."""
    torch.manual_seed(args.seed)
    model = AVDiT(layout, args.dim, args.depth, args.heads, args.prediction)
    schedule, weights = NoiseSchedule(1000), dict(model.named_parameters())
    averages = {name: p.detach().clone() for name, p in weights.items()}
    first = {name: torch.zeros_like(p) for name, p in averages.items()}
    second, saved, since, coins, norms = copy.deepcopy(first), {}, [], set(), []
    for step in range(args.steps):
        index, t, coin = train.draw(args, step, len(z), layout, 1000)
        eps = train.draw_noise(args.seed, step, torch.arange(args.batch), layout.E)
        z_t = (a := layout.per_element(schedule.a[t])) * z[index] + (s := layout.per_element(schedule.s[t])) * eps
        with torch.no_grad():
            z0_prev = predict(model, schedule, layout, z_t, t)[0] if coin else None
        out = model(z_t, t, z0_prev)
        error = (out - {"eps": eps, "v": a * eps - s * z[index], "z0": z[index]}[args.prediction]) ** 2
        weight = (6.25 * s**2).clamp(max=1) if args.prediction == "z0" else (s > 0).float()
        loss = SCALES[step % 2] * ((weight * error).sum(1) / weight.sum(1)).mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
        norm = sum(g.square().sum() for g in gradients.values()).sqrt().item()
        warm = min(1, (step + 1) / min(args.warmup, args.steps / 10))
        rate = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in weights.items():
                g = gradients[name] * min(1, 1 / norm)
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.99 * second[name] + 0.01 * g**2
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.99 ** (step + 1))
                p.copy_(p - rate * 0.01 * p - rate * m / (v.sqrt() + 1e-8))
                averages[name] = decay * averages[name] + (1 - decay) * p
        coins.add(coin)
        norms.append(norm)
        since.append((error.detach(), layout.per_element(t)))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            errors, times = (torch.cat(x) for x in zip(*since))
            video = torch.arange(layout.E) < layout.sizes[0]
            wanted = [times > 0, (times > 0) & video, (times > 0) & ~video]
            line, since = [errors[where].mean().item() for where in wanted], []
            saved[step + 1] = {name: p.detach().clone() for name, p in weights.items()}, dict(averages), line
    assert coins == {True, False} and min(norms) < 1 < max(norms), norms  # else the test would see less
    return saved


@pytest.mark.parametrize(("prediction", "accumulate"), [("eps", 1), ("v", 4), ("z0", 2)])
def test_the_loop_is_alg_2(call, latents, tmp_path, monkeypatch, prediction, accumulate):
    """Weights, averages and log of a short run, in whole batches and in micro-batches."""
    flags = {"optimizer": "adamw", "mixture": "monl+task:a2v", "lr": 0.01, "warmup": 2, "ema": 0.5, "steps": 24,
             "batch": 4, "seed": 8, "save_every": 5, "prediction": prediction,
             "dim": 32, "depth": 1, "heads": 2}  # fmt: skip
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), value)]
    loss, save, calls, states = train.training_loss, train.Run.save, [], []

    def scaled(*args):
        calls.append(args)
        value, error = loss(*args)
        return SCALES[(len(calls) - 1) // accumulate % 2] * value, error

    def saving(run, step):
        save(run, step)
        states.extend([checkpoint(tmp_path / "runs/z")] if step else [])

    monkeypatch.setattr(train, "training_loss", scaled)
    monkeypatch.setattr(train.Run, "save", saving)
    assert call(train, *latents, *words, "--accumulate", accumulate)[0] == 0
    with np.load(tmp_path / "z.npz") as file:  # every tenth clip is held out
        clips = [np.delete(file[name], [0, 10], 0).astype(np.float32) for name in ("video", "audio")]
    flat = [x.reshape(-1, x.shape[-1]) for x in clips]
    parts = [(x - y.mean(0)) / y.std(0, ddof=1) for x, y in zip(clips, flat)]
    z = torch.from_numpy(np.concatenate([x.reshape(10, -1) for x in parts], 1))
    saved = reference(SimpleNamespace(**flags), z, data.read_latents("z.npz")[1])
    for (weights, averages, _), state in zip(saved.values(), states, strict=True):
        for name, p in weights.items():
            torch.testing.assert_close(state["model"][name], p, atol=1e-4, rtol=1e-3, msg=name)
            torch.testing.assert_close(state["ema"][name], averages[name], atol=1e-4, rtol=1e-3, msg=name)
    header, *rows = csv.reader((tmp_path / "runs/z/log.csv").open())
    assert header == ["step", "mse", "video", "audio"]
    assert [int(row[0]) for row in rows] == [5, 10, 15, 20, 24] == list(saved)
    for row, (_, _, line) in zip(rows, saved.values()):
        assert [float(x) if x else math.nan for x in row[1:]] == pytest.approx(line, rel=1e-3, nan_ok=True)


# --- Every flag has its effect ----------------------------------------------------------------------------------------


@pytest.fixture
def losses(monkeypatch):
    """What every call of training_loss gets, and the weights it finds."""
    calls, loss = [], train.training_loss

    def spy(net, schedule, layout, z0, t, eps, self_conditioning=False):
        call = SimpleNamespace(net=net, layout=layout, z0=z0, t=t, eps=eps, coin=self_conditioning)
        call.weights = copy.deepcopy(net.state_dict())
        calls.append(call)
        return loss(net, schedule, layout, z0, t, eps, self_conditioning)

    monkeypatch.setattr(train, "training_loss", spy)
    return calls


def test_data_names_what_is_trained_on(call, latents, losses, tmp_path):
    """Two files with other numbers: the latents of each reach the loss, in zero mean and unit variance."""
    rng = np.random.default_rng(7)
    for k in range(2):
        latents_file(tmp_path / f"{k}.npz", audio=rng.standard_normal((12, 6, 5)))
        assert call(train, *latents, "--data", f"{k}.npz", "--out", k, "--steps", 30, "--save-every", 30)[0] == 0
        z0 = losses[0].layout.unpack(torch.cat([x.z0 for x in losses]))["audio"]
        with np.load(f"{k}.npz") as file:
            clips = np.delete(file["audio"], [0, 10], 0)
        clips = (clips - clips.mean((0, 1))) / clips.reshape(-1, 5).std(0, ddof=1)
        nearest = np.abs(z0.numpy()[:, None] - clips).max((2, 3))
        assert (nearest.min(1) < 1e-4).all() and set(nearest.argmin(1)) == set(range(10))  # all 10, and nothing else
        losses.clear()


def test_a_file_of_any_modalities_is_trained_on(call, tmp_path):
    rng = np.random.default_rng(0)
    pose, touch = rng.standard_normal((4, 3, 2)), rng.standard_normal((4, 2, 5, 1))
    np.savez(tmp_path / "x.npz", pose=pose, pose_edges=range(4), touch=touch, touch_edges=range(3))
    assert call(train, "--data", "x.npz", "--preset", "toy", "--steps", 1, "--batch", 2)[0] == 0
    header = next(csv.reader((tmp_path / "runs/toy/log.csv").open()))
    assert header == ["step", "mse", "pose", "touch"]


def test_fps_size_and_sample_rate_are_the_format_of_a_folder(call, tmp_path, monkeypatch):
    formats = []

    def stop(path, layout, media, **more):
        formats.append((layout, media))
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "clip_windows", stop)
    (tmp_path / "a.mp4").write_text("")
    assert call(train, "--data", ".", "--fps", 10, "--size", 96, "--sample-rate", 8000)[0] == 130
    ((layout, media),) = formats
    assert media == (10, 96, 8000) and layout.modalities[0].grid == (3, 3) and layout.modalities[0].edges[1] == 0.1


def test_preset_or_flags_set_the_networks_size(call, latents, losses, monkeypatch):
    def size(name, *flags):
        assert call(train, *latents, "--preset", name, "--out", name + "".join(flags), "--steps", 1, *flags)[0] == 0
        net = losses[-1].net
        assert net.prediction == PRESETS[name].prediction
        return net.dim, len(net.blocks), net.blocks[0].heads

    for name, width in (("clips", 16), ("paper", 24)):
        monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], dim=width, depth=width // 8, heads=2))
        assert size(name) == (width, width // 8, 2)
    assert size("clips", "--dim", "48", "--depth", "3", "--heads", "6") == (48, 3, 6)


@pytest.mark.parametrize("mixture", ["task:a2v", "vanilla+task:v2a", "pm"])
def test_mixture_is_what_timesteps_are_drawn_from(call, latents, losses, mixture):
    assert call(train, *latents, "--mixture", mixture)[0] == 0
    t = torch.cat([x.t for x in losses])
    video, audio = losses[0].layout.split(t).values()
    assert (video == video[:, :1]).all() and (audio == audio[:, :1]).all()  # one timestep per modality
    video, audio = video[:, 0], audio[:, 0]
    if mixture == "task:a2v":
        assert (audio == 0).all() and (video > 0).all()
    elif mixture == "pm":
        assert (t > 0).all() and (video != audio).all()  # but one in 1000
    else:
        assert (audio > 0).all() and {*video.sub(audio).sign().tolist()} == {0, -1} and (video == 0).any()
        assert ((video == audio) | (video == 0)).all()


def test_batch_steps_and_accumulate(call, latents, losses, tmp_path):
    """Micro-batches hold the rows of the batch, in turn."""
    flags = ("--batch", 6, "--steps", 3)
    assert call(train, *latents, *flags, "--out", "a")[0] == 0
    whole = [torch.cat([x.z0, x.t, x.eps], 1) for x in losses]
    assert [len(x) for x in whole] == [6, 6, 6] and checkpoint(tmp_path / "a")["step"] == 3
    losses.clear()
    assert call(train, *latents, *flags, "--out", "b", "--accumulate", 3)[0] == 0
    parts = [torch.cat([x.z0, x.t, x.eps], 1) for x in losses]
    assert [len(x) for x in parts] == [2] * 9 and torch.equal(torch.cat(parts), torch.cat(whole))
    assert len({tuple(row[-5:].tolist()) for row in torch.cat(whole)}) == 18  # noise is never the same


def test_self_conditioning_follows_the_coin(call, latents, losses, monkeypatch):
    coins, shown, draw, forward = [], [], train.draw, AVDiT.forward
    monkeypatch.setattr(train, "draw", lambda *args: (*draw(*args)[:2], coins.append(len(coins) % 3 > 0) or coins[-1]))
    monkeypatch.setattr(AVDiT, "forward", lambda self, z, t, z0_prev=None: (
        shown.append((z0_prev is not None, torch.is_grad_enabled())), forward(self, z, t, z0_prev))[1])  # fmt: skip
    assert call(train, *latents)[0] == 0
    assert [x.coin for x in losses] == coins == [False, True, True, False]
    once, twice = [(False, True)], [(False, False), (True, True)]  # an estimate shown, gradients kept
    assert shown == [*once, *twice, *twice, *once]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_at_its_learning_rate(name, call, latents, monkeypatch):
    rates = []
    for kind in (torch.optim.AdamW, train.Muon):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, step=step: (rates.extend(
            (type(self).__name__, group["lr"]) for group in self.param_groups), step(self))[1])  # fmt: skip
    assert call(train, *latents, "--optimizer", name, "--lr", 0.004)[0] == 0
    used = {"adamw": {"AdamW": 1}, "muon": {"AdamW": 1, "Muon": 2.5}}[name]
    peaks = [0.004 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]  # warm after a tenth of a run
    assert rates == [(kind, pytest.approx(scale * peak)) for peak in peaks for kind, scale in used.items()]
    model = PRESETS["toy"].model(TOY)
    groups = {k: o.param_groups for k, o in train.make_optimizers(name, model).items()}
    names = {id(p): n for n, p in model.named_parameters()}
    found = {k: {names[id(p)] for group in groups[k] for p in group["params"]} for k in groups}
    assert sum(map(len, found.values())) == len(names) and set.union(*found.values()) == set(names.values())
    weights = {"ada.weight", "qkv.weight", "attend.weight", "mlp.0.weight", "mlp.2.weight"}
    assert found.get("muon", set()) == {f"blocks.0.{w}" for w in weights if name == "muon"}


def test_warmup_is_a_share_of_the_run(call, latents, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    flags = ("--steps", 30, "--save-every", 30, "--lr", 0.01, "--optimizer", "adamw")
    for warmup in (1, 2, 9):
        assert call(train, *latents, *flags, "--warmup", warmup, "--out", warmup)[0] == 0
        for at in range(30):
            share = min(1, (at + 1) / min(warmup, 3))
            assert rates[at] == pytest.approx(0.01 * share * 0.5 * (1 + math.cos(math.pi * at / 30)))
        rates.clear()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muon_is_torchs_in_float32(shape, monkeypatch):
    """Five steps against torch.optim.Muon, whose bf16 is made float64 here, as our own arithmetic is."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=g, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in "ab")
    optimizers = [
        train.Muon([ours]),
        torch.optim.Muon([theirs], weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
    ]
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # to torch 2.14
    monkeypatch.setattr(torch, "bfloat16", torch.float64)  # from 2.15
    for step in range(5):
        gradient = torch.randn(shape, generator=g, dtype=torch.float64)
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
    assert (ours - start).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_the_average_of_a_long_run_has_the_decay_that_is_asked_for():
    slow, fast = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        slow.weight.fill_(1)
        fast.weight.fill_(0)
    train.update_ema(slow, fast, 100_000, 0.999)
    assert slow.weight.item() == pytest.approx(0.999) and fast.weight.item() == 0


def test_the_seed_changes_weights_batches_timesteps_and_noise(call, latents, losses):
    for seed in (0, 1, 2**31):
        assert call(train, *latents, "--seed", seed, "--steps", 1, "--out", seed)[0] == 0
    for k, one in enumerate(losses):
        for other in losses[:k]:
            assert not any(torch.equal(getattr(one, name), getattr(other, name)) for name in ("z0", "t", "eps"))
            for name in ("blocks.0.qkv.weight", "project_in.audio.weight", "embed.0.weight", "space.video"):
                assert not torch.equal(one.weights[name], other.weights[name])


def test_a_seed_of_more_than_32_bits_is_refused_or_used(call, latents, losses):
    """torch's generator takes 32 bits of a seed, so that 2**32 would have the weights of seed 0."""
    assert call(train, *latents)[0] == 0
    status, _, _ = call(train, *latents, "--seed", 2**32, "--out", "o")
    assert status == 2 or not equal(losses[0].weights, losses[4].weights)


def test_save_every(call, latents, tmp_path, monkeypatch):
    saved, save = [], train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda self, step: (saved.append(step), save(self, step))[1])
    for every, steps in ((1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6, 7]), (9, [0, 7])):
        assert call(train, *latents, "--steps", 7, "--save-every", every, "--out", every)[0] == 0
        lines = list(csv.reader((tmp_path / str(every) / "log.csv").open()))[1:]  # one with every checkpoint
        assert saved == steps and [int(line[0]) for line in lines] == steps[1:]
        saved.clear()
    monkeypatch.setattr(train.Log, "EVERY", 2)
    assert call(train, *latents, "--steps", 7, "--save-every", 3, "--out", "other")[0] == 0
    lines = list(csv.reader((tmp_path / "other/log.csv").open()))[1:]
    assert saved == [0, 3, 6, 7] and [int(line[0]) for line in lines] == [2, 3, 4, 6, 7]


def test_out_is_where_the_run_lies(call, latents, tmp_path):
    status, out, _ = call(train, *latents, "--out", "deep/in/here")
    assert status == 0 and out.splitlines()[-1] == "done: deep/in/here/ckpt.pt"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["deep", "z.npz"]
    assert sorted(x.name for x in (tmp_path / "deep/in/here").iterdir()) == ["ckpt.pt", "log.csv"]


def test_progress_is_printed(call, latents, tmp_path):
    """With the error of log.csv, the speed, and the time that is left."""
    _, out, _ = call(train, *latents)
    lines = [line.split() for line in out.splitlines() if "steps/s" in line]
    rows = list(csv.reader((tmp_path / "runs/z/log.csv").open()))[1:]
    assert [line[1] for line in lines] == ["2/4", "4/4"]
    assert [float(line[3]) for line in lines] == pytest.approx([float(row[1]) for row in rows], abs=1e-4)
    assert all(float(line[4]) > 0 for line in lines) and lines[-1][6:] == ["0:00", "left"]


def test_compile_compiles_the_blocks_that_are_trained(call, latents, losses, monkeypatch):
    calls = []

    def compile(block, **how):
        assert how == {"fullgraph": True}
        block._compiled_call_impl = lambda *args: calls.append(block) or block._call_impl(*args)  # as torch does

    monkeypatch.setattr(Block, "compile", compile)
    assert call(train, *latents)[0] == 0 and not calls
    losses.clear()
    assert call(train, *latents, "--compile", "--out", "o")[0] == 0
    passes = 4 + sum(x.coin for x in losses)
    assert calls == [*losses[0].net.blocks] * passes and all(x.net is losses[0].net for x in losses)
    assert equal(checkpoint(Path("runs/z"))["model"], checkpoint(Path("o"))["model"])


@pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which(os.getenv("CXX", "g++"))), reason="no C++ compiler")
@pytest.mark.parametrize("dim, heads, modalities", [(128, 4, "toy"), (256, 4, "clips"), (1024, 16, "toy")])
def test_compiled_gradients_are_eager_ones(dim, heads, modalities):
    """At two batch sizes, of which the second has a program of its own. 1024 is the paper's width."""
    device, layout = train.open_device("auto"), Layout(PRESETS[modalities].modalities)
    torch.manual_seed(0)
    model, schedule = AVDiT(layout, dim, 2, heads, "z0").to(device), NoiseSchedule().to(device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)  # behind a matrix of zeros every gradient would be zero

    def gradients(*batch):
        model.zero_grad()
        training_loss(model, schedule, layout, *batch, self_conditioning=True)[0].backward()
        return [p.grad.clone() for p in model.parameters()]

    batches = []
    for size in (4, 6):
        z0, eps = torch.randn(2, size, layout.E, device=device)
        batches.append((z0, sample_timesteps("monl", layout, size, 1000).to(device), eps))
    eager = [gradients(*batch) for batch in batches]
    for block in model.blocks:
        block.compile(fullgraph=True)
    for batch, expected in zip(batches, eager):
        for found, right in zip(gradients(*batch), expected):
            assert 0 < right.norm() < torch.inf and (found - right).norm() <= 1e-5 * right.norm()


# --- Devices and precision --------------------------------------------------------------------------------------------


def test_device_is_where_the_run_computes(call, latents, losses, monkeypatch):
    names = []
    monkeypatch.setattr(train, "open_device", lambda name: names.append(name) or CPU)
    for name in ("auto", "cuda", "mps"):
        assert call(train, *latents, "--steps", 1, "--device", name)[0] == 0
    assert names == ["auto", "cuda", "mps"]
    meta, moved = SimpleNamespace(device=torch.device("meta"), mesh=None), torch.zeros(2, 3)
    assert [x.device.type for x in train.Machine.put(meta, moved, moved)] == ["meta", "meta"]


def test_auto_takes_the_accelerator_if_there_is_one(monkeypatch):
    for kind, auto in ((None, "cpu"), ("cuda", "cuda"), ("mps", "mps"), ("xpu", "cpu")):
        found = torch.device(kind) if kind else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=found: found)
        assert train.open_device("auto").type == auto and train.open_device("cpu").type == "cpu"
        for name in {"cuda", "mps"} - {kind}:
            with pytest.raises(ValueError, match=f"no {name} here: use .*cpu"):
                train.open_device(name)


class Operations(TorchDispatchMode):
    """Records the operations of a block and the types of their results."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen.add((str(function), out.dtype if isinstance(out, torch.Tensor) else None))
        return out


@pytest.mark.parametrize(
    ("name", "chip", "bf16"),
    [
        ("fp32", {"avx512_bf16": True, "amx_bf16": True}, False),
        ("bf16", {}, True),
        ("auto", {}, False),
        ("auto", {"avx512_bf16": False, "amx_bf16": False, "avx2": True}, False),
        ("auto", {"avx512_bf16": True}, True),
        ("auto", {"amx_bf16": True}, True),
    ],
)
def test_dtype_is_that_of_products_in_every_forward_pass(call, latents, monkeypatch, name, chip, bf16):
    """Weights stay float32."""
    operations, forward = [], AVDiT.forward

    def spy(self, *args):
        with Operations() as recorded:
            out = forward(self, *args)
        operations.append(recorded.seen)
        assert out.dtype == (torch.bfloat16 if bf16 else torch.float32)
        return out

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: chip, raising=False)
    monkeypatch.setattr(AVDiT, "forward", spy)
    assert call(train, *latents, "--dtype", name)[0] == 0
    assert len(operations) > 4  # of passes without gradient, too
    for seen in operations:
        products = {dtype for function, dtype in seen if function.startswith(("aten.mm.", "aten.addmm."))}
        assert products == {torch.bfloat16 if bf16 else torch.float32}
    state = checkpoint(Path("runs/z"))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in state["model"].values())


@pytest.mark.parametrize(
    ("device", "chip", "auto"),
    [("cuda", True, True), ("cuda", False, False), ("mps", True, False), ("xla", True, True)],
)
def test_auto_on_other_devices(monkeypatch, device, chip, auto):
    """bf16 where the chip computes in it, not where it is emulated. Weights in bf16 are never cached."""
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: asked.append((args, how)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: chip or including_emulation)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    for name, enabled in (("auto", auto), ("bf16", True), ("fp32", False)):
        train.precision(name, SimpleNamespace(type=device))
        assert asked.pop() == ((device, torch.bfloat16), {"enabled": enabled, "cache_enabled": False})


def test_bf16_gradients_are_those_of_fp32():
    """The pass without gradient must not leave casts of the weights behind that cut the gradient of the next."""
    layout, schedule, gradients = TOY, NoiseSchedule(), []
    g = torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(4, layout.E, generator=g) for _ in "ab")
    t = sample_timesteps("ptm", layout, 4, 1000, g)
    model = AVDiT(layout, 128, 4, 4, "z0")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=g)
    for dtype in ("fp32", "bf16"):
        model.zero_grad()
        with train.precision(dtype, CPU):
            loss, _ = training_loss(model, schedule, layout, z0, t, eps, self_conditioning=True)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        assert (a - b).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_every_micro_batch(world):
    machines = [SimpleNamespace(world=world, rank=rank, mesh=None) for rank in range(world)]
    for accumulate in (1, 2, 3):
        rows = [train.Machine.rows(machine, 24, accumulate) for machine in machines]
        assert {len(x) for part in rows for x in part} == {24 // accumulate // world}
        for k in range(accumulate):
            want = torch.arange(24 // accumulate) + k * 24 // accumulate
            assert torch.equal(torch.cat([part[k] for part in rows]), want)
    with pytest.raises(ValueError, match=f"--batch 24 is not a multiple of --accumulate 5 x {world} devices"):
        train.Machine.rows(machines[0], 24, 5)


def test_one_process_names_all_rows_for_its_xla_devices():
    machine = SimpleNamespace(world=1, rank=0, mesh=SimpleNamespace(device_ids=range(4)))
    assert torch.equal(torch.cat(train.Machine.rows(machine, 24, 3)), torch.arange(24))
    with pytest.raises(ValueError, match="--batch 24 is not a multiple of --accumulate 4 x 4 devices"):
        train.Machine.rows(machine, 24, 4)


def test_xla_does_not_mix_with_torchrun(call, latents, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = call(train, *latents, "--device", "xla")
    assert status == 2 and "start it without torchrun" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device here")
def test_an_absent_device_is_named(call, latents):
    status, _, err = call(train, *latents, "--device", "cuda")
    assert status == 2 and "no cuda here: use" in err


def test_a_checkpoint_lies_on_the_cpu(call, latents, monkeypatch):
    """Every tensor passes through .cpu(), which gives ones here."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.ones_like(self))
    assert call(train, *latents, "--optimizer", "muon")[0] == 0
    state = checkpoint(Path("runs/z"))
    for name in ("model", "ema", "adamw", "muon"):
        tensors = [x for x in tree_leaves(state[name]) if isinstance(x, torch.Tensor)]
        assert tensors and all((x == 1).all() for x in tensors)


# --- The log ----------------------------------------------------------------------------------------------------------


def test_the_log_is_of_all_and_of_every_modality(tmp_path):
    """Every element at t > 0 counts once, whatever its loss weight."""
    layout, g = TOY, torch.Generator().manual_seed(0)
    log = train.Log(tmp_path / "log.csv", layout, train.Machine("cpu"))
    log.began = (0, -1e6)
    error, t = torch.rand(5, layout.E, generator=g), torch.randint(0, 3, (5, layout.S), generator=g)
    for rows in (slice(2), slice(2, 5)):  # in two parts
        log.add(error[rows], t[rows])
    log.write(5, 10)
    sums, counts = np.zeros(2), np.zeros(2)
    for example, at in zip(error.tolist(), layout.per_element(t).tolist()):
        for k, (e, time) in enumerate(zip(example, at)):
            if time:
                sums[int(k >= layout.sizes[0])] += e
                counts[int(k >= layout.sizes[0])] += 1
    t = 1000 * layout.of(["video"]).expand(1, -1)
    log.add(error[:1], t)  # the next line has its own steps alone, and no sound
    log.write(6, 10)
    one, two = csv.DictReader((tmp_path / "log.csv").open())
    assert one.pop("step") == "5" and two.pop("step") == "6" and two.pop("audio") == ""
    want = [sums.sum() / counts.sum(), *(sums / counts)]
    assert [float(x) for x in one.values()] == pytest.approx(want, abs=2e-5)
    want = error[0, : layout.sizes[0]].mean().item()
    assert [float(x) for x in two.values()] == pytest.approx([want, want], abs=2e-5)


# --- What a training step draws ---------------------------------------------------------------------------------------


def draws(seed, step, batch=6, mixture="monl", examples=4096):
    args = SimpleNamespace(seed=seed, batch=batch, mixture=mixture)
    return train.draw(args, step, examples, TOY, 1000)


def test_batches_depend_on_seed_step_and_position_alone():
    torch.manual_seed(1)
    one = draws(0, 7)
    torch.manual_seed(2)  # the state of torch's own generator does not matter
    assert equal(one, draws(0, 7)) and not torch.equal(one[0], draws(0, 8)[0])
    assert not torch.equal(one[1], draws(0, 8)[1]) and not torch.equal(draws(1, 7)[0], one[0])
    every = torch.arange(6)
    whole, other = (train.draw_noise(0, step, every, TOY.E) for step in (7, 8))
    assert whole.shape == (6, TOY.E) and abs(whole.std() - 1) < 0.05 and abs(whole.mean()) < 0.05
    assert len(whole.unique()) > 0.99 * whole.numel()  # a few float32 coincide, but no two rows
    assert torch.equal(train.draw_noise(0, 7, torch.tensor([4, 1]), TOY.E), whole[[4, 1]])
    assert not (other == whole).any() and not torch.equal(train.draw_noise(1, 7, every, TOY.E), whole)


def test_the_coin_falls_at_the_papers_rate():
    coins = [draws(0, step, batch=1)[2] for step in range(2000)]
    assert abs(sum(coins) / 2000 - 0.9) < 4 * (0.09 / 2000) ** 0.5


def test_draws_do_not_follow_each_other():
    """Indices of examples and their timesteps are uniform and unrelated, over many steps."""
    drawn = [draws(0, step, batch=32, mixture="vanilla", examples=1000) for step in range(200)]
    index, t = torch.stack([d[0] for d in drawn]).double(), torch.stack([d[1][:, 0] for d in drawn]).double()
    assert abs(index.mean() - 499.5) < 5 * 289 / 80 and abs(t.mean() - 500.5) < 5 * 289 / 80  # 6400 draws
    assert abs(torch.stack([index.flatten(), t.flatten()]).corrcoef()[0, 1]) < 5 / 80
    assert (index.min(), t.min()) == (0, 1) and index.max() > 990 and t.max() > 990


def test_noise_is_related_neither_to_the_draw_nor_to_its_neighbours():
    """A row's seed differs from those of its step's draw and of the neighbouring steps and seeds."""
    words = set()
    for seed in range(3):
        for step in range(20):
            eps = train.draw_noise(seed, step, torch.arange(8), 3)
            words |= {tuple(row.tolist()) for row in eps}
            word = np.random.SeedSequence([seed, step]).generate_state(1)[0]  # that of the draw
            start = torch.randn(3, generator=torch.Generator().manual_seed(int(word)))
            assert not any(torch.equal(start, row) for row in eps)
    assert len(words) == 3 * 20 * 8


# --- Mistakes ---------------------------------------------------------------------------------------------------------


MISTAKES = (
    ("--preset huge", "toy"),
    ("--mixture mono", "use monl, vanilla"),
    ("--mixture pm+", "unknown strategy"),
    ("--mixture task:smell", "task:continue-2s"),
    ("--data z.npz --mixture task:a2v", "unknown modality 'audio': use pose"),
    ("--data v.npz --mixture task:v2a --steps 1", "nothing"),  # all that there is would be given
    ("--data nowhere", "neither toy nor a folder"),
    ("--data none.npz", "none.npz"),
    ("--data .", "no usable clip"),
    ("--data", "expected one argument"),
    ("--size 64", "for a folder"),
    ("--data . --size 72", "multiple of 32"),
    ("--data . --fps 240 --sample-rate 8000", "use 15360"),
    ("--data . --fps 24 --sample-rate 22050", "use 22080"),
    ("--batch 4 --accumulate 3", "is not a multiple"),
    ("--stpes 3", "unrecognized"),
    ("--step 3", "unrecognized"),  # flags are not abbreviated
    ("--pre paper", "unrecognized"),
    ("toy", "unrecognized"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(call, tmp_path, arguments, message):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    np.savez(tmp_path / "v.npz", video=np.zeros((4, 3, 2)), video_edges=range(4))
    np.savez(tmp_path / "z.npz", pose=np.zeros((4, 3, 2)), pose_edges=range(4))
    status, _, err = call(train, *arguments.split())
    lines = [line for line in err.splitlines() if not line.startswith("skipped")]
    assert status == 2 and len(lines) == 1 and message in lines[0], (status, err)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["junk.pt", "v.npz", "z.npz"]  # nothing was written


@pytest.mark.parametrize("preset", PRESETS)
def test_help_names_every_flag_and_its_default(call, preset):
    status, out, _ = call(train, "--preset", preset, "--help")
    text = " ".join(out.split())
    assert status == 0 and "%" not in text and "None" not in text
    for name, value in train.RECIPES[preset].items():
        assert f"--{name} " in text and f"({value})" in text, name


def test_a_programs_own_error_keeps_its_traceback(call, latents, monkeypatch):
    def broken(*_):
        raise RuntimeError("a mistake in the program")

    monkeypatch.setattr(train, "training_loss", broken)
    with pytest.raises(RuntimeError, match="in the program"):
        call(train, *latents)


def test_a_script_starts_from_any_folder(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--steps", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("train.py: argument --steps: invalid int value: 'none'")
