"""Training finds the one denoiser that is right: on Gaussian data it is known, and so is the loss that it leaves."""

import math

import torch
from test_exact import SCHEDULE, SIZE, WORLD, Oracle, flat, unflat

from avdit import STRATEGIES, AVDiT, sample_timesteps, training_loss


def test_training_on_gaussian_data_approaches_the_oracles_loss():
    """One model trained on all four strategies: on each its loss is within 7 % of the oracle's, and at least half way
    there from the best denoiser that looks at each element alone."""
    torch.manual_seed(0)
    g, oracle, steps, lr = torch.Generator().manual_seed(0), Oracle(), 1000, 4e-3
    root = torch.linalg.cholesky(oracle.cov).float()
    alone = Oracle()
    alone.cov = torch.diag(oracle.cov.diagonal())  # what the elements tell of each other is withheld

    def draw(n, mixture):
        z0 = unflat(oracle.mean.float() + torch.randn(n, SIZE, generator=g) @ root.T)
        return z0, sample_timesteps(mixture, WORLD, n, 1000, g), unflat(torch.randn(n, SIZE, generator=g))

    model = AVDiT(WORLD, dim=64, depth=2, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = training_loss(model, SCHEDULE, *draw(128, "monl"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print()
    for strategy in STRATEGIES:
        z0, t, eps = draw(4000, strategy)
        with torch.no_grad():
            least, blind, own = (training_loss(f, SCHEDULE, z0, t, eps).item() for f in (oracle, alone, model))
            z_t = {m: SCHEDULE.add_noise(z0[m], eps[m], t[m]) for m in z0}
            distance = (flat(model(z_t, t)) - flat(oracle(z_t, t))).square().mean().item()
        print(
            f"{strategy:8} oracle {least:.4f}, excess of the model {own - least:.4f}, of each alone {blind - least:.4f}"
        )
        assert own - least < 0.07 * least and own - least < 0.5 * (blind - least)
        # The loss is the oracle's plus the squared distance to the oracle, but for the sampling error.
        assert abs(own - least - distance) < 0.2 * distance + 0.002
