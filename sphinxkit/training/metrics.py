"""Metrics of a step: counts over all processes, speed, utilisation, totals of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sphinxkit.sphinx_model import SphinxModel
from sphinxkit.training.flops import llm_flops, peak_flops, utilization, vision_flops
from sphinxkit.training.parallel import ParallelDims
from sphinxkit.training.plan import TrainPlan
from sphinxkit.training.streams import StepData

_TROUBLES = ("bad", "too_long", "truncated")


class StepMeter:
    """Measures steps and adds them up.

    Args:
        plan: The training plan.
        model: The model before ``cache_encoders``.
        dims: Process layout.
    """

    def __init__(self, plan: TrainPlan, model: SphinxModel, dims: ParallelDims) -> None:
        self.streams = list(plan.data)
        self.dims, self.llm, self.is_llm_trained = dims, model.llm, "llm" in plan.train
        self.peak = plan.peak_flops or peak_flops(dims.device, plan.dtype)
        passes = 3 if "encoders" in plan.train else 1  # a backward pass is two: for inputs and for weights
        self.image_flops = passes * vision_flops(model) if self.peak is not None else 0.0
        counted = ("samples", "tokens", *_TROUBLES, "skipped_steps", "seconds")
        self.totals: dict[str, float] = dict.fromkeys(counted, 0.0)

    def measure(self, data: StepData, seconds: float, *, is_skipped: bool) -> dict[str, Any]:
        """Metrics of a step other than its losses; every process must call it.

        Args:
            data: This process's data of the step.
            seconds: Duration of the step.
            is_skipped: Whether it updated nothing.
        """
        batches = [batch for group in data.batches.values() for batch in group]
        images = sum(batch.num_images for batch in batches)
        learnt = sum(batch.num_learnt for batch in batches)
        lengths = [length for stream in data.lengths.values() for length in stream]
        flops = llm_flops(self.llm, lengths, learnt, is_trained=self.is_llm_trained) + images * self.image_flops
        troubles = [len(data.bad), len(data.skipped), len(data.truncated)]
        by_stream = [sum(data.lengths.get(name, ())) for name in self.streams]
        sums = [images, flops, len(lengths), sum(lengths), *troubles, *by_stream]
        reduced = self.dims.reduce(torch.tensor(sums, dtype=torch.float64, device=self.dims.device)).tolist()
        images, flops, samples, tokens = reduced[:4]
        counted = {"samples": samples, "tokens": tokens, "seconds": seconds, "skipped_steps": float(is_skipped)}
        counted |= zip(_TROUBLES, reduced[4 : 4 + len(_TROUBLES)], strict=True)
        for key, value in counted.items():
            self.totals[key] += value
        record = {
            "data": self._digest(data.ids),
            "samples": int(samples),
            "images": int(images),
            "tokens": int(tokens),
            "too_long": int(counted["too_long"]),
            "truncated": int(counted["truncated"]),
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "stream_tokens_per_second": {
                name: count / seconds for name, count in zip(self.streams, reduced[4 + len(_TROUBLES) :], strict=True)
            },
            "mfu": utilization(flops, seconds, self.peak, self.dims.size),
            "total": dict(self.totals),
        }
        bad = [{"id": sample.id, "reason": sample.reason} for sample in data.bad]
        if counted["bad"]:
            record["bad"] = [entry for found in self._gather_data(bad) for entry in found]
        return record

    def _gather_data(self, value: Any) -> list[Any]:
        """Gather one value from each data-parallel rank."""
        return list(dict(self.dims.gather((self.dims.dp_rank, value))).values())

    def _digest(self, ids: Mapping[str, Iterable[str]]) -> str:
        """Sum of the samples' hashes over all processes; independent of the number of processes."""
        total = sum(_hash(stream, name) for stream, names in ids.items() for name in names)
        signed = torch.tensor(_as_signed(total), dtype=torch.int64, device=self.dims.device)
        return f"{int(self.dims.reduce(signed)) % 2**64:016x}"


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def _as_signed(value: int) -> int:
    """The signed 64-bit integer equal modulo 2**64; sums wrap around in the same way."""
    return (value + 2**63) % 2**64 - 2**63
