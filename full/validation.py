"""Measure the loss on the samples that are held out, the same on any layout."""

from functools import partial

import torch
from torch.utils.data import DataLoader

from full.faults import together
from full.folder import odd_samples
from sampler import DPSPBatchSampler
from train_min import collate, count_tokens, flow_loss, to_device


@torch.no_grad()
def validate(model, held_out, pm, args):
    """Return the mean flow loss over the held-out samples, and the names of samples that make it not finite.

    Each sample is used at four noise levels, with the same noise every time. So it is far quieter than the training loss,
    and the same on any layout. A batch is as large as training's micro-batch.
    """
    total = torch.zeros((), device=pm.device)
    count = 0.0
    odd = []
    size = pm.dp_size * -(-args.batch // (pm.dp_size * args.accumulation))
    for sigma in (0.2, 0.4, 0.6, 0.8):
        kinds = dict(shapes=held_out.shapes, names=held_out.names)
        sampler = DPSPBatchSampler(len(held_out), size, pm.dp_rank, pm.dp_size, **kinds)
        same_noise = partial(collate, seed=0, shift=1.0, caption_drop=0.0, sigma=sigma)
        for batch in DataLoader(held_out, batch_sampler=sampler, collate_fn=same_noise):
            odd += [] if odd else odd_samples([batch], held_out)
            total += flow_loss(model, to_device(batch, pm.device), args.guidance, pm.sp_group)
            count += count_tokens(batch, model.config)
    names = sorted({name for names in together(lambda: odd) for name in names})
    loss = pm.sum(total.double(), pm.world_group) / pm.sum(count, pm.dp_group)
    return loss.item(), names
