"""Uploads a model with a model card to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from sphinxkit import checkpoint
from sphinxkit.errors import CheckpointError
from sphinxkit.hub import SCHEME
from sphinxkit.recipe.convert import convert
from sphinxkit.recipe.inspection import Inspection, inspect
from sphinxkit.recipe.provenance import PROVENANCE
from sphinxkit.recipe.recipe import document_to_yaml
from sphinxkit.sphinx_model import SphinxModel

CARD_NAME = "README.md"
_TEXTS = ("*.json", "*.yaml", "*.jinja", "tokenizer.model", CARD_NAME)
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_LOAD_HF = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

import sphinxkit

sphinxkit.integrations.transformers.register()
model = AutoModelForImageTextToText.from_pretrained("{repo}")
processor = AutoProcessor.from_pretrained("{repo}")
"""
_LOAD = """\
import sphinxkit

model = sphinxkit.load("{scheme}{repo}")
print(model.chat("What is in the picture?", "photo.jpg"))
"""
_PAPER = """\
@article{lin2023sphinx,
  title = {SPHINX: The Joint Mixing of Weights, Tasks, and Visual Embeddings for Multi-modal Large Language Models},
  author = {Lin, Ziyi and others},
  journal = {arXiv preprint arXiv:2311.07575},
  year = {2023}
}
"""


def push_to_hub(
    model_or_path: SphinxModel | str | os.PathLike[str],
    repo: str,
    *,
    format: Literal["hf", "sphinxkit"] | None = None,
    private: bool | None = None,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model to the hub in one commit, with a model card.

    The card says what the model is made of, how to load it and what it was mixed from. A ``README.md`` in the directory
    is uploaded in its place.

    Args:
        model_or_path: A model, or the directory of a checkpoint in any readable format.
        repo: ``org/name``; made if it does not exist.
        format: "hf" for transformers, "sphinxkit" for our own; None uploads a directory as it is and a model
            as "sphinxkit". ``sphinxkit.load("hf://org/name")`` reads all of them.
        private: Whether a new repository is private; None: as the organisation's settings say.
        license: For the card, such as "llama2".
        base_model: For the card: repositories that this model comes from.
        commit_message: Of the commit; None names sphinxkit.
        token: Of the hub; None: the one that ``hf auth login`` stored.
    Returns:
        The commit's address.
    Raises:
        CheckpointError: ``repo`` is no name, the checkpoint is damaged or cannot be converted, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not _REPO.fullmatch(repo):
        raise CheckpointError(f"push_to_hub: {repo!r:.80} is no repository; expected org/name")
    with _folder(model_or_path, format) as folder:
        with checkpoint.open(folder, verify=True) as opened:
            names = {path.name for path in opened.files} | {each.name for p in _TEXTS for each in folder.glob(p)}
        operations = [CommitOperationAdd(name, str(folder / name)) for name in sorted(names)]
        if CARD_NAME not in names:
            text = model_card(folder, repo, license=license, base_model=base_model)
            operations.append(CommitOperationAdd(CARD_NAME, text.encode()))
        api = HfApi(token=token)
        message = commit_message or f"Upload {repo.split('/')[1]} with sphinxkit"
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.create_commit(repo, operations, commit_message=message)
        except Exception as error:  # connection, authentication and validation errors come from several libraries
            raise CheckpointError(
                f"{repo}: cannot be uploaded ({type(error).__name__}: {str(error).strip():.200}). Check the name, the "
                "network (or HF_HUB_OFFLINE) and `hf auth login`"
            ) from error
    return str(commit.commit_url)


@contextmanager
def _folder(model_or_path: SphinxModel | str | os.PathLike[str], format: str | None) -> Iterator[Path]:
    """The folder to upload; a model and a converted checkpoint lie in a temporary one."""
    with TemporaryDirectory(prefix="sphinxkit-push-") as temporary:
        if isinstance(model_or_path, SphinxModel):
            folder, format = Path(temporary) / "own", None if format == "sphinxkit" else format
            model_or_path.save(folder)
        else:
            folder = checkpoint.resolve(model_or_path)
        yield folder if format is None else convert(folder, Path(temporary) / "converted", format=format)


def model_card(
    folder: Path, repo: str, *, license: str | None = None, base_model: str | Sequence[str] | None = None
) -> str:
    """The text of a model card.

    Args:
        folder: Of the checkpoint.
        repo: ``org/name``.
        license: See :func:`push_to_hub`.
        base_model: As there.
    Raises:
        CheckpointError: The checkpoint cannot be opened.
        RecipeError: Its recipe is not valid.
    """
    import yaml

    facts = inspect(folder)
    is_hf = facts.stored is not None and facts.stored.format == "hf_sphinx"
    has_vision = facts.image_size is not None
    bases = [base_model] if isinstance(base_model, str) else list(base_model or ())
    head: dict[str, Any] = {
        "library_name": "transformers" if is_hf else "sphinxkit",
        "pipeline_tag": "image-text-to-text" if has_vision else "text-generation",
        "tags": ["sphinx", "sphinxkit", *(["multimodal"] if has_vision else [])],
        **({"license": license} if license else {}),
        **({"base_model": bases} if bases else {}),
    }
    use = _LOAD.format(scheme=SCHEME, repo=repo)
    blocks = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {repo.split('/')[1]}",
        "A model of the SPHINX family ([arXiv:2311.07575](https://arxiv.org/abs/2311.07575)), made with sphinxkit.",
        _parts(facts),
        "## Use",
        *([f"```python\n{_LOAD_HF.format(repo=repo)}```", "or, without transformers:"] if is_hf else []),
        f"```python\n{use}```",
    ]
    provenance = folder / PROVENANCE
    if provenance.is_file():
        sources = json.loads(provenance.read_text(encoding="utf-8"))
        blocks += ["## Provenance", f"```json\n{json.dumps(sources, indent=1)}\n```"]
    blocks += ["## Recipe", f"```yaml\n{document_to_yaml(facts.recipe)}```", "## Citation", f"```bibtex\n{_PAPER}```"]
    return "\n\n".join(blocks) + "\n"


def _parts(facts: Inspection) -> str:
    rows = [("parameters", f"{facts.num_parameters:,}"), ("context", f"{facts.max_seq_len} tokens")]
    if facts.image_size is not None:
        size, views = facts.image_size, facts.num_views
        rows += [("images", f"{size} x {size} pixels in {views} views: {facts.num_image_tokens} tokens")]
    rows += [(name, f"{count:,} parameters") for name, count in facts.parts.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
