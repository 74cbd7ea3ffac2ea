"""One training step: token-weighted losses of all streams, gradients and the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sphinxkit.data.collate import Batch
from sphinxkit.formatters.labels import IGNORE_INDEX
from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training.errors import TrainingError
from sphinxkit.training.optim import gradient_norm, scale_gradients, set_learning_rate
from sphinxkit.training.parallel import ParallelDims


class NonFiniteError(TrainingError):
    """A loss or gradient is not finite; the weights have not been touched."""


class LossModule(nn.Module):
    """The model with its loss as ``forward``, so that FSDP gathers weights for the loss.

    Args:
        model: Names of parameters are its own behind ``model.``.
    """

    def __init__(self, model: SphinxModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross entropy over the labelled tokens of a batch, and the balance loss (0 without experts).

        Every trained parameter takes part in every batch, with or without images, because all processes must reduce the
        same gradients.

        Shape:
            return: (2,)
        """
        rows = batch.image_rows if batch.pixels is not None else None
        total, _, balance = self.model.loss_sums(batch.token_ids, batch.labels, batch.pixels, rows, batch.seq_lens)
        if self.model.vision is not None:
            every = [parameter for parameter in self.model.vision.parameters() if parameter.requires_grad]
            total = torch.stack([total, *(parameter.sum().float() * 0.0 for parameter in every)]).sum()
        return torch.stack([total, total.new_zeros(()) if balance is None else balance.to(total.dtype)])


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Losses of a step, over all processes.

    Args:
        loss: Weighted mean of the streams' means; the gradients belong to it. None: no stream had a token in the loss.
            A mixture of experts adds its weighted balance loss.
        streams: Mean cross entropy per token of each stream with tokens in the loss.
        num_learnt: Tokens in the loss of each stream.
        balance: Balance loss of a mixture of experts, without its weight: the mean over batches, by stream as the loss.
    """

    loss: float | None
    streams: dict[str, float]
    num_learnt: dict[str, int]
    balance: float | None = None


def idle_batch(device: torch.device) -> Batch:
    """A batch without loss; keeps a process with fewer batches in step with the others.

    Args:
        device: Of its tensors.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    return Batch(ids, torch.full_like(ids, IGNORE_INDEX), ())


class TrainStep:
    """Accumulates gradients over batches as for one large batch, and updates the weights.

    The loss is ``sum_s w_s mean_s / sum_s w_s``: the mean over all tokens in the loss of each stream s, over all
    batches and processes, weighted by stream. A mixture of experts adds to each mean its weight times the
    mean of the stream's balance losses, each of one batch in one process.

    Args:
        module: The loss; sharded or not.
        optimizer: Optimiser of the trained parameters.
        dims: Process layout.
        weights: Weights of the streams.
        max_grad_norm: Maximum gradient norm; None: no limit.
    """

    def __init__(
        self,
        module: LossModule,
        optimizer: torch.optim.Optimizer,
        dims: ParallelDims,
        weights: Mapping[str, float],
        max_grad_norm: float | None = None,
    ) -> None:
        self.module, self.optimizer, self.dims, self.max_grad_norm = module, optimizer, dims, max_grad_norm
        self.weights = dict(weights)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def backward(self, batches: Mapping[str, Sequence[Batch]]) -> StepLosses:
        """Add the gradients of one step.

        Args:
            batches: Any number of this process's batches, by stream; every process must name the same streams.
        Raises:
            NonFiniteError: A loss is not finite; the message names the samples.
        """
        names = list(self.weights)
        dims = self.dims
        counts = torch.tensor(
            [sum(batch.num_learnt for batch in batches.get(name, ())) for name in names], device=dims.device
        )
        passes = torch.tensor([len(batches.get(name, ())) for name in names], device=dims.device)
        num_learnt = dims.reduce(counts).tolist()
        has_experts = self.module.model.llm.moe is not None
        balance_weight = self.module.model.load_balancing_weight
        num_batches = dims.reduce(passes.clone()).tolist() if has_experts else []
        num_passes = dims.reduce(passes, dist.ReduceOp.MAX).tolist()
        total_weight = sum(self.weights[name] for name, count in zip(names, num_learnt, strict=True) if count)
        sums = torch.zeros(len(names), 2, dtype=torch.float64)
        culprits: list[str] = []
        for index, name in enumerate(names):
            own = batches.get(name, ())
            share = self.weights[name] / total_weight / num_learnt[index] if num_learnt[index] else 0.0
            balance_share = share * num_learnt[index] / num_batches[index] if has_experts and share else 0.0
            losses = []
            for number in range(num_passes[index]):
                batch = own[number].to(dims.device) if number < len(own) else idle_batch(dims.device)
                loss = self.module(batch)
                scaled = loss[0] * (share * dims.dp_size)  # gradients are averaged over processes with other data
                if has_experts and number < len(own):
                    scaled = scaled + loss[1] * (balance_weight * balance_share * dims.dp_size)
                scaled.backward()
                losses.append(loss.detach().double())
            for loss, batch in zip(torch.stack(losses).cpu() if losses else [], own, strict=False):
                sums[index] += loss
                if not torch.isfinite(loss).all():
                    culprits += batch.ids
        reduced = dims.reduce(sums.to(dims.device)).cpu()
        if not torch.isfinite(reduced).all():
            found = sorted({name for ids in dims.gather(culprits) for name in ids})
            raise NonFiniteError(f"the loss is not finite; samples of the batches that gave it: {', '.join(found)}")
        counted = dict(zip(names, num_learnt, strict=True))
        means = {n: float(s) / c for n, (s, _), c in zip(names, reduced, num_learnt, strict=True) if c}
        if not means:
            return StepLosses(None, means, counted)
        loss = sum(self.weights[name] * mean for name, mean in means.items()) / total_weight
        if not has_experts:
            return StepLosses(loss, means, counted)
        pairs = {n: float(b) / c for n, (_, b), c in zip(names, reduced, num_batches, strict=True) if n in means}
        balance = sum(self.weights[name] * mean for name, mean in pairs.items()) / total_weight
        return StepLosses(loss + balance_weight * balance, means, counted, balance)

    def update(self, rate: float) -> float:
        """Clip the gradients, update the weights and clear the gradients.

        Args:
            rate: Learning rate.
        Returns:
            The gradients' norm before clipping.
        Raises:
            NonFiniteError: It is not finite; nothing was updated.
        """
        norm = gradient_norm(self.parameters)
        value = float(norm)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the norm of the gradients is {value}, although every loss was finite")
        if self.max_grad_norm is not None:
            scale_gradients(self.parameters, norm, self.max_grad_norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.clear()
        return value

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
