"""timm's own files, in any of the layouts that timm itself still reads."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from sphinxkit.encoders.formats.base import FoundTensor, Translation, WeightFormat
from sphinxkit.tensor_files import StoredTensor

# Heads whatever their architecture: the classifier (beside the name that timm's configuration gives) and SigLIP's
# pooling by attention.
_HEADS = ("head.", "head_dist.", "attn_pool.")


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class TimmFormat(WeightFormat):
    """timm's files: the model's own ``checkpoint_filter_fn`` renames, reshapes and resamples what is older.

    The filter gets views of mapped files, so that what it does not change is not copied.

    Source: timm, models/_builder.py, load_pretrained.
    """

    name: str = "timm"
    marks: tuple[str, ...] = (".+",)
    rules: tuple[Any, ...] = ()

    def fits(self, names: Collection[str]) -> bool:
        """Always; what does not fit the model is listed when it is loaded."""
        return True

    def translate(self, tensors: Mapping[str, StoredTensor], trunk: nn.Module) -> Translation:
        """As :meth:`WeightFormat.translate`, through timm's filter for this model."""
        result = Translation()
        given: dict[str, Tensor] = {name: tensor.read() for name, tensor in tensors.items()}
        filter = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
        filtered = given
        if filter is not None:
            try:
                filtered = filter(dict(given), trunk)
            except (KeyError, IndexError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
                result.errors.append(f"timm's filter for the model does not take them: {type(error).__name__}: {error}")
                return result
        own = trunk.state_dict()
        facts: Any = trunk.pretrained_cfg
        classifier = facts.get("classifier") or ()
        heads = (*_HEADS, *(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier)))
        file = next(iter(tensors.values())).file
        for name, tensor in filtered.items():
            if name not in own and name.startswith(heads):
                result.skipped.append(name)
                continue
            shape = tuple(tensor.shape)
            stored = StoredTensor(file, name, shape, tensor.dtype, partial(_itself, tensor))
            result.found[f"{self.prefix}{name}"] = FoundTensor.of([stored])
            if name in given and tuple(given[name].shape) != shape:
                result.resampled.append(f"{name} from {list(given[name].shape)} to {list(shape)}")
        return result


TIMM_FORMATS = (TimmFormat(),)
