"""The paper's baselines [App. C.2]: how a model that knows only one shared timestep is made to keep what is given.

Replacement overwrites the given part with noised truth before every step. Reconstruction guidance also moves the wanted
part so that the model's own given part comes closer to the truth. tests/score.py compares both with generate().
"""

from functools import partial
from itertools import pairwise

import torch

from avdit import SAMPLERS, check_choice, noise_like, predict, respaced


@torch.inference_mode(False)  # inference mode would forbid the gradient
def generate_baseline(model, schedule, layout, z0, given, *, strength=0.0, steps=250, sampler="ddim", generator=None,
                      on_step=None):  # fmt: skip
    """Generate as avdit.generate() does, but with one timestep for all segments [App. C.2] -> (B, E).

    strength  lambda of reconstruction guidance [Eq. 8, Eq. 9, Eq. 10, Eq. 11, Eq. 12], 0.02 in the paper. After a step,
              the wanted part moves against the gradient of the step's squared error in the given part. 0 is replacement
              alone.

    DIFFERS FROM PAPER: the norm in Eq. 9 is squared, as it is in Eq. 11 and 12. We differentiate with respect to the
    step's input. As printed in Eq. 8 to 12, both variables are outputs of the step, so the gradient would be zero. In
    Eq. 10 the given part enters as noised truth, as it does in Eq. 8.
    """
    check_choice("sampler", sampler, SAMPLERS)
    taus, noise = respaced(schedule.T, steps, z0.device), partial(noise_like, z0, generator)
    given = given.to(z0.device, torch.bool).expand(len(z0), -1)  # (B, S)
    given_e = layout.per_element(given)  # (B, E)
    z, z0_prev = noise(), torch.zeros_like(z0)
    then = schedule.scales(layout, taus[0].expand_as(given))
    truth = then[0] * z0 + then[1] * noise()  # read only where given
    for i, (tau, tau_next) in enumerate(pairwise(taus)):
        t, now, then = tau.expand_as(given), then, schedule.scales(layout, tau_next.expand_as(given))
        with torch.set_grad_enabled(strength > 0):
            z = torch.where(given_e, truth, z).requires_grad_(strength > 0)
            z0_hat, eps_hat = predict(model, schedule, layout, z, t, z0_prev)
            z_next = SAMPLERS[sampler](z, z0_hat, eps_hat, now, then, noise)  # [Eq. 8, Eq. 10]
            truth = then[0] * z0 + then[1] * noise()
            if strength:
                error = torch.where(given_e, z_next - truth, 0).square().sum()
                z_next = z_next - strength * then[1] * torch.autograd.grad(error, z)[0]  # [Eq. 9, Eq. 11, Eq. 12]
        z, z0_prev = z_next.detach(), z0_hat.detach()  # no clean value: the model's own estimate everywhere
        if on_step:
            on_step(i + 1, steps)
    return torch.where(given_e, z0, z)
