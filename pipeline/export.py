"""Writes a run's weights as one plain Hugging Face model, with an adapter merged into its base.

A quantized base is turned back first: the exported model answers as the run's does, which the
original weights would not.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.config.load import load_config
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import RunFolderError
from pipeline.library_output import without_bars
from pipeline.records import RunFolder
from pipeline.trained import trained_model, trained_processor


def export(run: RunFolder, output: Path) -> Path:
    """Merge and save; the folder appears only once it is whole.

    Raises:
        RunFolderError: the run has no trained model, or the folder holds something.
    """
    if not run.model.is_dir():
        raise RunFolderError(f"{run.path} holds no trained model: train the run to its end first.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        fault = "is not empty" if output.is_dir() else "is a file"
        raise RunFolderError(f"{output} {fault}; name a new folder to export to.")
    config = load_config(run.path)
    plan = DropoutPlan.read(run.plan)
    processor = trained_processor(run, config)
    model: Any = trained_model(run, config, plan, processor, dequantize=True)
    if config.peft is not None:
        model = model.merge_and_unload()
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    with without_bars():
        model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    if output.exists():
        output.rmdir()
    os.replace(unfinished, output)
    return output
