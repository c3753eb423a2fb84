"""Makes mistakes in the four scripts and looks whether a fast test fails. `python tests/mutants.py --help`

Mistakes by hand are in HAND. --count N adds N automatic ones per script: an operator, constant, comparison or branch is
changed. Results go to a file, and the same command goes on where it stopped.
"""

import argparse
import ast
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
from itertools import islice
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FAST = {  # script: its fast tests
    "avdit": ["test_sampling.py", "test_method.py", "test_exact.py", "-k", "not ddpm-1000 and not neighbour"],
    "data": ["test_data.py"],
    "train": ["test_train.py", "test_lost.py", "-k", "not killed"],
    "sample": ["test_sample.py"],
}
PAIRS = [
    (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq),
    (ast.In, ast.NotIn), (ast.Is, ast.IsNot), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr),
]  # fmt: skip
SWAP = {**dict(PAIRS), **{b: a for a, b in PAIRS}, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv}

HAND = {  # module: (what is there, what a tired student makes of it)
    "avdit": [
        ("torch.full((n,), k) for n, k in zip(self.lengths, first)",
         "torch.full((n,), 0) for n, k in zip(self.lengths, first)"),
        ("b n c -> b (n p) c", "b n c -> b (p n) c"),
        ("if x.shape[1] < 256:", "if True:"),
        ("(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)", "(q @ k.mT).softmax(-1)"),
        ("x_m.repeat_interleave(m.P * m.channels, -1)", "x_m.repeat(*[1] * (x.ndim - 1), m.P * m.channels)"),
        ("torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])",
         "torch.cat([1 - beta[:1], (1 - beta).cumprod(0)])"),
        ("(layout.starts + layout.ends) / 2, boundaries, right=True",
         "(layout.starts + layout.ends) / 2, boundaries, right=False"),
        ('"vanilla": lambda t_ref, layout: t_ref[:, :1]', '"vanilla": lambda t_ref, layout: t_ref[:1, :1]'),
        ('"pm": lambda t_ref, layout: t_ref[:, layout.first_of_modality]',
         '"pm": lambda t_ref, layout: t_ref[:, :1].expand_as(t_ref)'),
        ('"pt": lambda t_ref, layout: t_ref[:, coincident(layout)]',
         '"pt": lambda t_ref, layout: t_ref[:, (torch.arange(layout.S) - layout.first_of_modality).clamp(max=layout.lengths[0] - 1)]'),
        ("layout, task=name: torch.where(task_mask(task", "layout: torch.where(task_mask(name"),
        ("torch.randint(1, T + 1, (batch", "torch.randint(0, T + 1, (batch"),
        ("torch.randint(len(names), (batch,), generator=generator)",
         "torch.randint(len(names), (1,), generator=generator).expand(batch)"),
        ("shift1, scale1, shift2, scale2 = layout", "scale1, shift1, shift2, scale2 = layout"),
        ("q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])", "pass"),
        ('rearrange(self.qkv(y), "b l (three h e) -> three b h l e"',
         'rearrange(self.qkv(y), "b l (h three e) -> three b h l e"'),
        ("else z0_prev.clamp(-10, 10)", "else z0_prev"),
        ("(self.time[m.name][:, None] + self.space[m.name]).to(x.dtype)",
         "(self.time[m.name][:, None] + self.space[m.name])"),
        ("sinusoid(t, self.dim)", "sinusoid(t / 1000, self.dim)"),
        ("z0_hat = torch.where(s > 0, out, z)", "z0_hat = out"),
        ("        with torch.no_grad():\n            z0_prev",
         "        with torch.enable_grad():\n            z0_prev"),
        ('"v": a * eps - s * z0, "z0"', '"v": s * eps - a * z0, "z0"'),
        ("(6.25 * s**2).clamp(max=1)", "(6.25 * s).clamp(max=1)"),
        ('if model.prediction == "z0" else (s > 0).float()', 'if model.prediction != "eps" else (s > 0).float()'),
        ("((weight * error).sum(1) / weight.sum(1).clamp(min=1e-8)).mean()",
         "(weight * error).sum() / weight.sum().clamp(min=1e-8)"),
        ("error = (model(z_t, t, z0_prev) - target) ** 2", "error = (model(z_t, t) - target) ** 2"),
        ("alpha = (a / a_next) ** 2", "alpha = a / a_next"),
        ("/ alpha.sqrt()\n", "* alpha.sqrt()\n"),
        ("(1 - alpha) / s.clamp(min=1e-8) * eps_hat", "(1 - alpha) / a * eps_hat"),
        ("torch.where(s_next > 0, (1 - alpha).sqrt() * noise(), 0)", "(1 - alpha).sqrt() * noise()"),
        ("return a_next * z0_hat + s_next * eps_hat", "return a_next * z0_hat.clamp(-3, 3) + s_next * eps_hat"),
        ("torch.linspace(T, 0, steps + 1, dtype", "torch.linspace(T, 1, steps + 1, dtype"),
        ("[torch.tensor(tau, device=device) for tau in taus.tolist()]", "taus.tolist()"),
        ("torch.where(dropped_e, noise(), z)", "torch.where(dropped_e, 0, z)"),
        ("torch.where(dropped, schedule.T, t)", "t"),
        ("torch.where(dropped_e, 0, z0_prev)", "z0_prev"),
        ("(1 + guidance) * cond - guidance * uncond", "guidance * cond + (1 - guidance) * uncond"),
        ("dropped = given & layout.of(", "dropped = layout.of("),
        ("t, t_next = torch.where(given, 0, tau), torch.where(given, 0, tau_next)",
         "t, t_next = tau.expand_as(given), tau_next.expand_as(given)"),
        ("z0_prev = torch.where(given_e, z0, z0_hat)", "z0_prev = z0_hat"),
        ("now, then = schedule.scales(layout, t), schedule.scales(layout, t_next)",
         "then, now = schedule.scales(layout, t), schedule.scales(layout, t_next)"),
        ("return torch.where(given_e, z0, z)\n\n\n# --- Presets", "return z\n\n\n# --- Presets"),
    ],
    "data": [
        ("toy_clips(4096, 0)", "toy_clips(4096, 1)"),
        ("toy_clips(min(count, 1024), 1,", "toy_clips(min(count, 1024), 0,"),
        ("self.patches(x[:, ::4], 1), video)", "self.patches(x[:, :1], 1), video)"),
        ("start = (self.size - self.hop) // 2\n        return",
         "start = self.size // 2 + (self.size - self.hop) // 2\n        return"),
        ('"-max_alloc", "500000000", ', ""),
        ('"-protocol_whitelist", "fd", ', ""),
        (', "-t", "3600", "-f", "nut"', ', "-f", "nut"'),
        ("return (latents - self.mean) / self.std", "return latents - self.mean"),
        ("% 10 > 0]", "% 10 == 0]"),
        ("x[::10][:count]", "x[torch.arange(len(x)) % 10 > 0][:count]"),
        ("rank[name] % 10 == 0", "True"),
        ("every or frames)]", "frames)]"),
        ("round(k / media.fps * media.sample_rate)", "int(k / media.fps * media.sample_rate)"),
        (":rematrix_maxval=1", ""),
        (".nan_to_num()", ""),
        ('"crop=min(iw\\\\,ih/sar):min(ih\\\\,iw*sar)"', '"crop=min(iw\\\\,ih):min(ih\\\\,iw)"'),
        (":start_time=0", ""),
        (":first_pts=0", ""),
        ("residual=True)\n\n    def training_clips", "residual=False)\n\n    def training_clips"),
        ("rank = int((S[:rank] > 1e-5 * x.norm()).sum())", "pass"),
        ("V * V.gather(0, V.abs().argmax(0)[None]).sign()", "V"),
        ("root = (S[:rank] / len(x) ** 0.5).sqrt()", "root = S[:rank] / len(x) ** 0.5"),
        ("torch.randperm(len(x), generator=generator)[:clips]", "torch.arange(len(x))[:clips]"),
        ("generator=generator) < share", "generator=generator) < 2"),
        ("audio.abs().max() < 1e-4", "False"),
        ("0 < len(tenth) < len(rank)", "0 < len(tenth)"),
        (" or list(parts.values()))", ")"),
        ("islice(found, count)", "found"),
        ('n k h w (f p q c)"\n        return rearrange(video.float()',
         'n k h w (f q p c)"\n        return rearrange(video.float()'),
        ("j + samples <= len(audio)", "True"),
        ("allow_pickle=False", "allow_pickle=True"),
        ("z[:, :1] @ self.slope\n        video", "0\n        video"),
        ("rounds=60", "rounds=1"),
        ("self.griffin_lim(root.clamp(min=0) ** 2)", "self.griffin_lim(root.clamp(min=0))"),
        ("max(2, len(arrays[names[0]]))", "len(arrays[names[0]])"),
        ("not name.isidentifier() or ", ""),
        ("V / root @ R / std", "V / root / std"),
        ("if media.size % self.PATCH:", "if False:"),
        (":out_color_matrix=bt709:out_primaries=bt709:out_transfer=bt709", ""),
        ("    if done.returncode:\n", "    if False:\n"),
        ('if sum("Stream #" in programme for programme in programmes) > 1:', "if False:"),
        ('if sum("Stream #" in programme for programme in programmes) > 1:', "if len(programmes) > 1:"),
        ("zlib.crc32(repr(files).encode())", "len(files)"),
        ('f"fps={media.fps}:start_time=0"', 'f"fps={media.fps}"'),
        ('ffmpeg(clip, "-copyts", *fill', 'ffmpeg(path, "-copyts", *fill'),
        ('if "video" not in needed', "if False"),
        ('if "audio" not in needed', "if False"),
        ('if "audio" in needed and audio', "if audio"),
        ("if [checksum] != names:", "if False:"),
        ("zlib.crc32(repr(modalities[-1]).encode(), checksum)", "checksum"),
        ("zlib.crc32(z, zlib", "zlib.crc32(b'', zlib"),
        ("except (ValueError, OSError) as why:", "except ValueError as why:"),
        ('name.startswith("given_")', "False"),
        (' // int(os.getenv("LOCAL_WORLD_SIZE", "1"))', ""),
        (".lower().endswith", ".endswith"),
    ],
    "train": [
        ("parameters(), 1.0)", "parameters(), 1e9)"),
        ("t_rows, eps, self_conditioning)", "t_rows, eps, False)"),
        (".item() < 0.9", ".item() < 0.5"),
        ("        run.set_learning_rate(learning_rate(args, step))\n", ""),
        ("1 - min(decay, (1 + step) / (10 + step))", "1 - decay"),
        ("1 - min(decay, (1 + step) / (10 + step))", "1 - (1 + step) / (10 + step)"),
        ("update_ema(run.ema, run.model, step, args.ema)", "update_ema(run.ema, run.model, step, 0.995)"),
        ("torch.manual_seed(args.seed)", "torch.manual_seed(0)"),
        ("SeedSequence([args.seed, step])", "SeedSequence([0, step])"),
        ("draw_noise(args.seed, step", "draw_noise(0, step"),
        ("SeedSequence([args.seed, step])", "SeedSequence([args.seed, 0])"),
        ("SeedSequence([seed, step, row + 1])", "SeedSequence([seed, step, row])"),
        ('name == "auto" and bool(native)', 'name == "auto" and False'),
        ('name == "auto" and bool(native)', 'name == "auto"'),
        ("block.compile(fullgraph=True)", "pass"),
        ("        run.model.zero_grad()\n", ""),
        ("        for rows in micro_batches:\n",
         "        for rows in micro_batches:\n            run.model.zero_grad()\n"),
        ("(loss / args.accumulate).backward()", "loss.backward()"),
        ("        for optimizer in run.optimizers.values():\n            optimizer.step()\n        update_ema(run.ema, run.model, step, args.ema)\n",
         "        update_ema(run.ema, run.model, step, args.ema)\n        for optimizer in run.optimizers.values():\n            optimizer.step()\n"),
        ("        self.sums.zero_()\n", ""),
        (" * 0.5 * (1 + math.cos(math.pi * step / args.steps))", ""),
        ("min(args.warmup, args.steps / 10)", "args.warmup"),
        ("draw_noise(args.seed, step, rows", "draw_noise(args.seed, step, torch.arange(len(rows))"),
        ("z[index[rows]]", "z[rows % len(z)]"),
        ("t[rows], eps)", "t[: len(rows)], eps)"),
        ("if not torch.stack([x.isfinite().all() for x in tensors]).all():", "if False:"),
        ("tensors = [self.machine.total(self.log.sums), *self.model.parameters()]",
         "tensors = [self.machine.total(self.log.sums)]"),
        ("tensors = [self.machine.total(self.log.sums), *self.model.parameters()]",
         "tensors = [*self.model.parameters()]"),
        ('FREE = ("data",', 'FREE = ("seed", "data",'),
        ('FREE = ("data", ', "FREE = ("),
        ("    alone(path.parent.absolute())\n", "    path.parent.mkdir(parents=True, exist_ok=True)\n"),
        ("except (ImportError, OSError):", "except ImportError:"),
        ('        sys.stdout.reconfigure(errors="backslashreplace")', "        pass"),
        ("type=expanduser, help=\"toy,", "help=\"toy,"),
        ("noisy = self.layout.per_element(t > 0)", "noisy = self.layout.per_element(t > 1)"),
        ('if saved["modalities"] != self.about["modalities"]:', "if False:"),
        ('    other = path.with_name(path.name + ".partial")\n', "    other = path.with_name(path.name)\n"),
        ('if checksum != self.about["checksum"]:', "if False:"),
        ("if step == 0 and self.path.exists():", "if False:"),
        (" and not isinstance(why.__context__, OSError)", ""),
        ("sys.stdout or open(os.devnull, \"w\")", "sys.stdout"),
        ("        self.parts |= self.optimizers\n", ""),
        ("if zipfile.ZipFile(file).testzip():", "if not zipfile.ZipFile(file):"),
        ("weights_only=True", "weights_only=False"),
        ("tree_map_only(torch.Tensor, torch.Tensor.cpu, state)", "state"),
        ("cache_enabled=False", "cache_enabled=True"),
        ("AVDiT(data.layout, args.dim, args.depth, args.heads", "AVDiT(data.layout, args.dim, args.depth, args.depth"),
        ("betas=(0.9, 0.99)", "betas=(0.9, 0.999)"),
        ("lerp_(p.grad, 0.05)", "lerp_(p.grad, 0.1)"),
        ("sample_timesteps(args.mixture, layout, args.batch", 'sample_timesteps("monl", layout, args.batch'),
        ("parents=[first], allow_abbrev=False", "parents=[first]"),
    ],
    "sample": [
        ("guidance=args.guidance,", "guidance=0.0,"),
        ("guidance_drop=args.guidance_drop or None", "guidance_drop=None"),
        ("torch.Generator().manual_seed(args.seed)", "torch.Generator().manual_seed(0)"),
        (".flip(0).numpy()", ".numpy()"),
        (".abs()[: 1 + 4000 * size // rate]", ".abs()"),
        ("sampler=args.sampler or trained.preset.sampler", "sampler=trained.preset.sampler"),
        ("steps=args.steps or trained.preset.sampling_steps", "steps=trained.preset.sampling_steps"),
        ('load_state_dict(saved["ema"])', 'load_state_dict(saved["model"])'),
        ("np.where(given[:, None], GREY, GREEN)", "np.where(given[:, None], GREEN, GREY)"),
        ("{name: x[index] for name, x in clips.items()}, index",
         "{name: x[index.flip(0)] for name, x in clips.items()}, index"),
        ("soundfile.write(buffer := BytesIO(), audio, rate", "soundfile.write(buffer := BytesIO(), audio, 2 * rate"),
        ('"ffmpeg_log_level": "error", **sound}', '"ffmpeg_log_level": "error"}'),
        ('settings = {"fps": made["fps"]', 'settings = {"fps": 2 * made["fps"]'),
        ('for folder in (task, "true") if given.any() else (task,):', "for folder in (task,):"),
        ("src='{folder}/{i:02}.mp4'", "src='{folder}/{i:03}.mp4'"),
        ("at = i * width // len(video)", "at = max(0, i - 1) * width // len(video)"),
        ('(f"{name} true video", row(true[i]))', '(f"{name} true video", row(video[i]))'),
        (" | (self.shared & (torch.arange(self.count)[:, None] > 0))", ""),
        ("enumerate(windows.masks(given))", "enumerate(windows.masks(given)[:1].expand(windows.count, -1))"),
        ("round(k * self.stride * r)", "round(0 * self.stride * r)"),
        (".clamp(max=x.shape[1] - 1)", " % x.shape[1]"),
        ('clips["video"][:, :frames] = video[-1][:, -frames:]', "pass"),
        ('layout.unpack(z_true)["audio"][:, :segments] = audio[-1][:, -segments:]', "pass"),
        ("torch.where(given_frames[:, None, None, None], *shown)", "shown[1]"),
        ("x[:, frames:] for x in video[1:]", "x for x in video[1:]"),
        ("x[:, segments:] for x in audio[1:]", "x for x in audio[1:]"),
        ("count = math.ceil((seconds - end) / step - 1e-6)", "count = int((seconds - end) / step)"),
        ("seconds = max(windows.span, min(windows.seconds, (given * windows.whole.ends).max().item()))",
         "seconds = windows.seconds"),
        ("seconds = max(windows.span, min(windows.seconds, (given * windows.whole.ends).max().item()))",
         "seconds = max(windows.span, (given * windows.whole.ends).max().item())"),
        ("needed=needed)", "needed=[])"),
        ("needed=needed)", 'needed=["video", "audio"])'),
        ("config[\"data\"] if data is None else data", "config[\"data\"]"),
        ("args.data is not None and kind_of", "False and kind_of"),
        ("windows.masks(given) & dropped", "windows.masks(given)"),
        ("windows.masks(given) & dropped", "given & windows.whole.of(args.guidance_drop or windows.whole.names)"),
        ("    alone(out)\n", ""),
        ("Path(args.input).resolve().parent.parent == Path(args.out).resolve()", "False"),
        ("elif args.input is not None:", "elif args.input:"),
        ('path / "ckpt.pt" if path.is_dir() else path', 'path if path.suffix == ".pt" else path / "ckpt.pt"'),
        ("Path(args.out).absolute()", "Path(args.out)"),
        ("self.model.to(device).eval()", "self.model.eval()"),
        ("open_device(args.device)", "open_device('auto')"),
        ("self.model.to(device).eval()", "self.model.to(device)"),
        ("held_out_clips(trained.held_out, args.n",
         "held_out_clips(sorted(p.name for p in trained.data.path.iterdir()) if hasattr(trained.data, 'media') and hasattr(trained.data.path, 'iterdir') else [], args.n"),
        ("given |= mask", "given = mask"),
        ("Path(args.out).absolute()", "Path('samples').absolute()"),
        ("    if not needed:\n", "    if False:\n"),
        (".split(64)", ".split(32)"),
        ('f"given_{name}": mask[: arrays[name]', 'f"given_{name}": ~mask[: arrays[name]'),
    ],
}  # fmt: skip


def places(tree):
    """Yields every (node, attribute, new value) that is one automatic mistake."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAP:
            yield node, "op", SWAP[type(node.op)]()
        elif isinstance(node, ast.UnaryOp):  # undo it by doing it twice
            yield node, "operand", ast.UnaryOp(node.op, node.operand)
        elif isinstance(node, ast.Compare):
            for i, op in enumerate(node.ops):
                yield node, "ops", [*node.ops[:i], SWAP[type(op)](), *node.ops[i + 1 :]]
        elif isinstance(node, (ast.IfExp, ast.If)):
            yield node, "test", ast.UnaryOp(ast.Not(), node.test)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.where":
            yield node, "args", [node.args[0], *node.args[:0:-1]]
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "value", not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            yield node, "value", node.value + 1 if isinstance(node.value, int) or not node.value else node.value * 2


def automatic(source):
    """All automatic mistakes: name -> source. A name is its line and what changed, so it outlives edits elsewhere."""
    tree, lines, found = ast.parse(source), source.splitlines(), {}
    for node, attribute, value in list(places(tree)):
        kept, before = getattr(node, attribute), ast.unparse(node).split("\n")[0]
        setattr(node, attribute, value)
        after = ast.unparse(node).split("\n")[0]
        name = f"{lines[node.lineno - 1].strip()} | {before} -> {after}"
        found[name + " (again)" * sum(known.startswith(name) for known in found)] = ast.unparse(tree)
        setattr(node, attribute, kept)
    return found


def start(name, source, folder):
    """Run the fast tests of a script with a mistake, on a copy in `folder`, in a child process, which has torch already
    -> its number."""
    child = os.fork()
    if child:
        return child
    signal.alarm(300)  # a mistake may never end
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    status = 1
    try:
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        for script in FAST:
            shutil.copy(ROOT / f"{script}.py", folder)
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        os.chdir(folder / "tests")
        sys.path.insert(0, str(folder))
        status = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *FAST[name]])
    finally:
        os._exit(status)


def fates(todo, jobs):
    """{key: (script, source)} -> yields (key, "noticed" or "unnoticed") as soon as it is known, `jobs` at a time."""
    waiting, running = iter(todo.items()), {}
    while True:
        for key, mistake in islice(waiting, jobs - len(running)):
            folder = tempfile.TemporaryDirectory()
            running[start(*mistake, Path(folder.name))] = key, folder
        if not running:
            return
        child, status = os.wait()
        key, folder = running.pop(child)
        folder.cleanup()
        yield key, "noticed" if status else "unnoticed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("`")[0])
    add = parser.add_argument
    add("--scripts", nargs="+", default=list(FAST), choices=FAST, help="the scripts to change (all)")
    add("--count", type=int, default=0, help="automatic mistakes per script (%(default)s)")
    add("--seed", type=int, default=0, help="seed of their choice (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="mistakes at a time (one per core)")
    add("--out", type=Path, default=Path("runs/mutants.csv"), help="file of results (%(default)s)")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # threads do not outlive a fork
    wanted = {}
    for script in args.scripts:
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        for old, new in HAND[script]:
            if source.count(old) != 1:
                sys.exit(f"not once in {script}.py: {old}")
            wanted[f"{script}, by hand: {old} -> {new}"] = script, source.replace(old, new)
        every = automatic(source)
        for name in random.Random(args.seed).sample(sorted(every), min(args.count, len(every))):
            wanted[f"{script}, automatic: {name}"] = script, every[name]
        wanted[f"{script}, as it stands"] = script, source
    known = dict(csv.reader(args.out.open())) if args.out.exists() else {}
    for key, result in fates({key: mistake for key, mistake in wanted.items() if key not in known}, args.jobs):
        known[key] = result
        with args.out.open("a", newline="") as file:
            csv.writer(file).writerow([key, result])
        print(f"{result:9} {key}", flush=True)
    worst = 1
    for script in args.scripts:
        if known[f"{script}, as it stands"] == "noticed":
            sys.exit(f"the tests of {script}.py fail as it stands")
        for kind in ("by hand", "automatic"):
            keys = [key for key in wanted if key.startswith(f"{script}, {kind}")]
            noticed = sum(known[key] == "noticed" for key in keys)
            if keys:
                print(f"{script}.py, {kind}: {noticed} of {len(keys)} noticed")
                worst = min(worst, noticed / len(keys))
    return worst < 0.9


if __name__ == "__main__":
    sys.exit(main())
