"""Every module has a test file of its name in the same place, or stands here under the file that tests it."""

from __future__ import annotations

from pathlib import Path

import sphinxkit

TESTS = Path(__file__).parent
PACKAGE = Path(sphinxkit.__file__).parent
NO_TESTS = {"__init__.py", "__main__.py", "version.py"}

TESTED_IN = {
    "acceleration/test_fused.py": "acceleration/accelerator acceleration/ops acceleration/snapshot llama/accelerator",
    "acceleration/test_loading.py": "acceleration/modes",
    "acceleration/cpu/test_gemv.py": "acceleration/cpu/probe",
    "checkpoint/test_open.py": "checkpoint/opened",
    "cli/test_cli.py": "cli/check cli/convert cli/inspect cli/memory cli/progress cli/verify",
    "cli/test_draw.py": "cli/task_options",
    "cli/test_list.py": "cli/completion evaluation/names",
    "cli/test_embedded.py": "cli/chat",
    "data/converters/test_convert.py": "data/converters/base",
    "cli/test_inspect_data.py": "data/inspection recipe/data_inspection",
    "data/sources/test_index.py": "data/sources/base data/sources/files data/sources/jsonl "
    "data/sources/kinds data/sources/tar",
    "encoders/formats/test_clip.py": "encoders/formats/base encoders/formats/configs",
    "encoders/test_qformer.py": "encoders/eva",
    "evaluation/test_layouts.py": "evaluation/metrics evaluation/result",
    "evaluation/test_run.py": "evaluation/manifest",
    "formatters/test_conversation.py": "formatters/base",
    "formatters/tasks/test_answers.py": "formatters/tasks/caption formatters/tasks/chart formatters/tasks/detection "
    "formatters/tasks/question formatters/tasks/region",
    "integrations/transformers/test_model.py": "integrations/transformers/config integrations/transformers/processor",
    "integrations/test_vllm.py": "integrations/vllm_model",
    "interpolation/test_stream.py": "interpolation/paging",
    "llama/test_model.py": "llama/base",
    "mixers/test_channel.py": "mixers/base",
    "nano/perception/test_training.py": "nano/perception/probe",
    "nano/stages/test_reproduce.py": "cli/reproduce nano/stages/steps",
    "nano/world/test_composition.py": "nano/world/page_blocks nano/world/pages nano/world/scene",
    "nano/world/test_render.py": "nano/world/palette",
    "nano/world/test_splits.py": "nano/world/words",
    "recipe/test_fetch.py": "cli/fetch",
    "recipe/test_other_models.py": "checkpoint/formats/tensor_folder recipe/differences recipe/open_checkpoints",
    "recipe/test_mixing.py": "recipe/opened_mix recipe/provenance",
    "recipe/test_recipe.py": "recipe/schema",
    "sphinx_model/test_model.py": "sphinx_model/images sphinx_model/parts sphinx_model/scoring",
    "test_parity.py": "evaluation/parity",
    "tilers/test_grid.py": "tilers/base",
    "tokenizer/test_hf.py": "tensor_files/tokenizer_files tokenizer/base",
    "tokenizer/test_sentencepiece.py": "tokenizer/tokenizer",
    "training/test_export_run.py": "cli/export training/export",
    "training/test_init_sources.py": "training/initial_weights",
    "training/test_loop.py": "training/errors training/streams",
    "training/test_resume.py": "training/resume_state training/state",
    "training/test_step.py": "training/trainable_model",
}


def test_every_module_has_its_tests() -> None:
    modules = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if p.name not in NO_TESTS}
    plain = {m.with_suffix("").as_posix() for m in modules if not (TESTS / m.with_name(f"test_{m.name}")).exists()}
    listed = [name for names in TESTED_IN.values() for name in names.split()]
    assert sorted(listed) == sorted(plain), "mend TESTED_IN: what is missing, or has a file of its own now"
    assert [path for path in TESTED_IN if not (TESTS / path).is_file()] == []
